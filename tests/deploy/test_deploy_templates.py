"""Templates of a deployment: what they give parses, and no value is left out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from jinja2 import UndefinedError

from fedpet.config import Experiment
from fedpet.deploy import Deployment, NodeSpec, write_deployment
from fedpet.deploy.flower_app import TEMPLATES
from fedpet.utils.templating import render


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    nodes = (NodeSpec("ward-1"), NodeSpec("ward-2", "/srv/rows"))
    as_before = "subprocess"  # Flower's own way, which all nodes went
    plain = Deployment(
        experiment=Experiment(),
        host="fed.example.org",
        nodes=nodes,
        threads=2,
        isolation=as_before,
    )
    write_deployment(plain, folder / "plain")
    tables = {"backbone": {"model": "org/name"}, "data": {"source": "org/rows"}}
    hub = Deployment(
        experiment=Experiment.from_tables(tables),
        host="10.0.0.7",
        nodes=nodes[:1],
        client_column="who",
        port=9000,
        bind="10.0.0.7",
        isolation=as_before,
    )
    write_deployment(hub, folder / "hub")
    six = Deployment(
        experiment=Experiment(),
        host="::1",
        nodes=nodes,
        bind="::1",
        clients=1,
        install="/srv/it's here",
        days=7,
        backbone="/m",
        isolation=as_before,
    )
    write_deployment(six, folder / "six")
    return folder


def test_every_script_parses_as_bash(folder: Path) -> None:
    scripts = [str(path) for path in folder.rglob("*.sh")]
    assert len(scripts) == 3 * 3 + 5
    for script in scripts:  # `bash -n` reads one file
        subprocess.run(["bash", "-n", script], check=True)


def test_every_compose_file_parses_and_reaches_the_server_by_a_name_of_its_own(
    folder: Path,
) -> None:
    for name, published in (("plain", "127.0.0.1"), ("hub", "10.0.0.7"), ("six", "[::1]")):
        services = yaml.safe_load((folder / name / "compose.yaml").read_text())["services"]
        server = services.pop("server")
        [port] = server["ports"]
        assert port.startswith(f"{published}:")
        assert server["networks"]["federation"]["aliases"] == ["fedpet-server"]
        for node in services.values():
            assert "--superlink fedpet-server:" in node["command"]
            assert not node["user"].startswith("0:")


def test_a_compose_file_names_nothing_but_what_the_deployment_holds(folder: Path) -> None:
    """As `docker compose up --build` would read it: what is mounted, built and started is there."""
    for name in ("plain", "hub", "six"):
        place = folder / name
        read = yaml.safe_load((place / "compose.yaml").read_text())
        assert set(read) == {"services", "networks"}
        for service in read["services"].values():
            [mounted] = service["volumes"]
            outside, _, inside = mounted.partition(":")
            assert inside == service["working_dir"]
            assert (place / outside / service["command"].split()[1]).is_file()
            assert set(service["networks"]) == set(read["networks"])
            assert service["restart"] == "unless-stopped"
            assert set(service.get("depends_on", ())) <= set(read["services"])
        docker = (place / "Dockerfile").read_text().splitlines()
        copied = [line.split()[1:] for line in docker if line.startswith("COPY")]
        assert copied == [["server/app", "/app"]]
        for word in " ".join(docker).split():
            if word.startswith("/app/"):
                assert (place / "server" / word.removeprefix("/")).is_file(), word


def test_every_readme_tells_which_machines_reach_the_server(folder: Path) -> None:
    reached = "which no other\n   machine reaches"
    texts = [(folder / name / "README.md").read_text() for name in ("plain", "hub", "six")]
    assert [reached in text for text in texts] == [True, False, True]


def test_a_template_that_lacks_a_value_is_refused() -> None:
    with pytest.raises(UndefinedError, match="'port' is undefined"):
        render(TEMPLATES / "superlink.sh.j2", bind="0.0.0.0", own_port=1, reply_mib=1)


def test_a_value_with_a_space_is_one_word_of_the_script() -> None:
    given = {"server": "a b", "port": 1, "stays": True, "script": "my client.py"}
    script = render(TEMPLATES / "supernode.sh.j2", **given)
    assert b"--superlink 'a b' " in script
    assert b"--script 'my client.py' " in script
