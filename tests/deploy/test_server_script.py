"""The server's script: SuperLink and relay start together and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fedpet.config import Experiment
from fedpet.deploy import Deployment, NodeSpec, write_deployment

STAYS = '#!/usr/bin/env bash\necho "$$ $*" >>"$NOTES"\nexec sleep 60\n'
ENDS = "#!/usr/bin/env bash\nexit 3\n"
# The script's own python: the trimming of the database comes through, the relay is another's.
PYTHON = '#!/usr/bin/env bash\n[ "$2" = fedpet.deploy.database ] || exec {relay} "$@"\n'


@pytest.fixture
def server(tmp_path: Path) -> Path:
    nodes = (NodeSpec("a"),)
    made = Deployment(experiment=Experiment(), host="127.0.0.1", nodes=nodes)
    write_deployment(made, tmp_path / "d")
    return tmp_path / "d" / "server"


def start(server: Path, superlink: str, relay: str) -> subprocess.Popen[bytes]:
    programs = server.parent / "programs"
    programs.mkdir()
    for name, text in (
        ("flower-superlink", superlink),
        ("relay", relay),
        ("python3", PYTHON.format(relay=programs / "relay")),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o700)
    environment = {**os.environ, "NOTES": str(server.parent / "notes")}
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    return subprocess.Popen([str(server / "superlink.sh")], env=environment, stderr=-1)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
@pytest.mark.parametrize("name", ["superlink.sh", "register.sh", "run.sh"])
def test_a_script_leaves_no_files_of_root_in_the_folder_of_another(server: Path, name: str) -> None:
    os.chown(server, 65534, 65534)
    before = sorted(server.iterdir())
    done = subprocess.run([str(server / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run this as that user" in done.stderr
    assert sorted(server.iterdir()) == before


def started(server: Path, count: int) -> dict[int, str]:
    """Wait for so many programs; the arguments of each, by its process."""
    notes, limit = server.parent / "notes", time.monotonic() + 60
    while count and not (notes.exists() and len(notes.read_text().splitlines()) >= count):
        assert time.monotonic() < limit
        time.sleep(0.05)
    text = notes.read_text() if notes.exists() else ""
    lines = (line.partition(" ") for line in text.splitlines())
    return {int(number): arguments for number, _, arguments in lines}


def is_gone(pid: int) -> bool:
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("superlink", "relay"), [(STAYS, ENDS), (ENDS, STAYS)])
def test_where_one_ends_the_other_does_and_the_server_has_failed(
    server: Path, superlink: str, relay: str
) -> None:
    with start(server, superlink, relay) as script:
        assert script.stderr is not None
        assert b"SuperLink or the relay has ended" in script.stderr.read()
        assert script.wait(60) == 1
    assert all(is_gone(pid) for pid in started(server, 0))


def test_a_server_that_is_told_to_end_leaves_nothing_running(server: Path) -> None:
    with start(server, STAYS, STAYS) as script:
        programs = started(server, 2)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 0
    assert all(is_gone(pid) for pid in programs)
    superlink, relay = sorted(programs.values(), key=lambda words: "--database" not in words)
    assert "--host 127.0.0.1 --port 8001" in superlink
    assert "--bind 127.0.0.1 --port 8000 --own-port 8001 --monitor-port 8002" in relay
