"""Templates of a deployment: the files that they always gave, and no value left out."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from fedpet.config import Experiment
from fedpet.deploy import Deployment, NodeSpec, write_deployment
from fedpet.deploy.flower_app import TEMPLATES
from fedpet.utils.templating import render

# Of the files that string formatting wrote, before there were templates.
BEFORE = {
    "hub/Dockerfile": "46d6102b13dc9434",
    "hub/README.md": "b246bebbf8c4643d",
    "hub/compose.yaml": "7d51d357b83c650e",
    "hub/nodes/ward-1/fedpet-supernode.service": "139cb8a0b0b555ed",
    "hub/nodes/ward-1/supernode.sh": "f7b4922fa8e3d0fd",
    "hub/server/fedpet-superlink.service": "9a0c19fc6be9ab02",
    "hub/server/register.sh": "884d948c9c891338",
    "hub/server/run.sh": "fd498968bf443261",
    "hub/server/superlink.sh": "2ef6a425986372a5",
    "plain/Dockerfile": "131b12b31749aaef",
    "plain/README.md": "5d80a2d7f52d71e0",
    "plain/compose.yaml": "a84d4a5ef6a21b81",
    "plain/nodes/ward-1/fedpet-supernode.service": "139cb8a0b0b555ed",
    "plain/nodes/ward-1/supernode.sh": "218f6299b35e5dfc",
    "plain/nodes/ward-2/fedpet-supernode.service": "01b7f143c6bab26d",
    "plain/nodes/ward-2/supernode.sh": "77a82dd97259e211",
    "plain/server/fedpet-superlink.service": "9a0c19fc6be9ab02",
    "plain/server/register.sh": "51fdae8597bef337",
    "plain/server/run.sh": "1878508bceb61ab2",
    "plain/server/superlink.sh": "808285bcdb9d0478",
    "six/Dockerfile": "131b12b31749aaef",
    "six/README.md": "f1dcf04054048d86",
    "six/compose.yaml": "99f76132fd4e7a8e",
    "six/nodes/ward-1/fedpet-supernode.service": "7ea37fabee743b66",
    "six/nodes/ward-1/supernode.sh": "8dc8050d72a788a6",
    "six/nodes/ward-2/fedpet-supernode.service": "19201aaebbc6ffb9",
    "six/nodes/ward-2/supernode.sh": "df79789397726e99",
    "six/server/fedpet-superlink.service": "dbe0f5af2dc7059b",
    "six/server/register.sh": "7d4e0f9f288cad79",
    "six/server/run.sh": "6c14ec4c0fdbb788",
    "six/server/superlink.sh": "b4562a7989978f22",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    nodes = (NodeSpec("ward-1"), NodeSpec("ward-2", "/srv/rows"))
    plain = Deployment(experiment=Experiment(), host="fed.example.org", nodes=nodes, threads=2)
    write_deployment(plain, folder / "plain")
    tables = {"backbone": {"model": "org/name"}, "data": {"source": "org/rows"}}
    hub = Deployment(
        experiment=Experiment.from_tables(tables),
        host="10.0.0.7",
        nodes=nodes[:1],
        client_column="who",
        port=9000,
        bind="10.0.0.7",
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
    )
    write_deployment(six, folder / "six")
    return folder


@pytest.mark.parametrize("name", sorted(BEFORE))
def test_a_template_gives_the_bytes_that_string_formatting_gave(folder: Path, name: str) -> None:
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] == BEFORE[name]


def test_every_script_parses_as_bash(folder: Path) -> None:
    scripts = [str(path) for path in folder.rglob("*.sh")]
    assert len(scripts) == 3 * 3 + 5
    for script in scripts:  # `bash -n` reads one file
        subprocess.run(["bash", "-n", script], check=True)


def test_a_template_that_lacks_a_value_is_refused() -> None:
    with pytest.raises(UndefinedError, match="'port' is undefined"):
        render(TEMPLATES / "superlink.sh.j2", bind="0.0.0.0")


def test_a_value_with_a_space_is_one_word_of_the_script() -> None:
    assert b"--host 'a b' --port 1 " in render(TEMPLATES / "superlink.sh.j2", bind="a b", port=1)
