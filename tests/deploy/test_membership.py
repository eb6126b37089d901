"""Nodes come and go, keys and certificates are replaced, in the folder that a deployment is."""

from __future__ import annotations

import json
import ssl
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from fedpet.config import Experiment
from fedpet.deploy import Deployment, NodeSpec, enrolment, membership, write_deployment
from fedpet.deploy.enrolment import enrol
from fedpet.deploy.node_status import NodeStatus, write_status
from fedpet.deploy.node_table import last_refusals, list_nodes
from fedpet.errors import ConfigError
from fedpet.server.allowed_nodes import AllowedNodes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    nodes = (NodeSpec("a"), NodeSpec("b", "/srv/rows"))
    made = Deployment(experiment=Experiment(), host="fed.example.org", nodes=nodes, max_rows=9)
    write_deployment(made, tmp_path / "here")
    return tmp_path / "here"


class FakeFlower:
    """SuperLink's list of nodes."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, Any] = {}

    def listed(self) -> dict[bytes, Any]:
        return dict(self.nodes)

    def register(self, key: bytes, name: str) -> None:
        self.nodes[key] = SimpleNamespace(node_id=len(self.nodes), name=name, status="registered")

    def turn_out(self, node_id: int) -> None:
        self.nodes = {key: one for key, one in self.nodes.items() if one.node_id != node_id}


def names(folder: Path) -> list[str]:
    return [node.name for _, node in AllowedNodes(folder / "server" / "nodes").items()]


def believes(folder: Path, place: str) -> bool:
    """Tell whether who holds this folder's ca.crt believes the server's certificate."""
    trusted = x509.load_pem_x509_certificates((folder / place / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "server" / "server.pem").read_bytes())
    host = x509.DNSName("fed.example.org")
    verifier = PolicyBuilder().store(Store(trusted)).build_server_verifier(host)
    try:
        return bool(verifier.verify(server, []))
    except x509.verification.VerificationError:
        return False


def test_a_deployment_reads_back(folder: Path) -> None:
    read = membership.read_deployment(folder)
    assert (read.host, [node.data for node in read.nodes]) == (
        "fed.example.org",
        ["data.jsonl", "/srv/rows"],
    )
    assert (read.max_rows, read.experiment.clients.node_keys) == (9, "nodes")


def test_a_node_that_is_added_has_all_that_the_first_ones_have(folder: Path) -> None:
    membership.add_node(folder, NodeSpec("c", "x.csv"))
    assert names(folder) == ["a", "b", "c"]
    files = [{p.name for p in (folder / "nodes" / n).iterdir()} for n in ("a", "c")]
    assert files[0] == files[1]
    assert believes(folder, "nodes/c")
    assert (folder / "server" / "nodes" / "c.toml").read_text() == "clients = 1\nrows = 9\n"
    assert 'client = "c"' in (folder / "nodes" / "c" / "node.toml").read_text()
    assert not [p for p in folder.rglob("*") if p.stat().st_mode & 0o077]
    with pytest.raises(ConfigError, match="each name once"):
        membership.add_node(folder, NodeSpec("c"))


def ports(folder: Path) -> dict[str, str]:
    scripts = sorted((folder / "nodes").glob("*/supernode.sh"))
    return {one.parent.name: one.read_text().rpartition(" --port ")[2][:4] for one in scripts}


def test_no_two_nodes_of_a_machine_have_one_port(folder: Path) -> None:
    membership.add_node(folder, NodeSpec("c"))
    membership.remove_node(folder, "b")
    assert ports(folder) == {"a": "8100", "c": "8102"}
    membership.add_node(folder, NodeSpec("d"))
    membership.add_node(folder, NodeSpec("e"))
    assert ports(folder) == {"a": "8100", "c": "8102", "d": "8101", "e": "8103"}


def test_the_rows_of_a_node_that_is_taken_out_stay(folder: Path) -> None:
    said = membership.remove_node(folder, "b")
    assert not (folder / "nodes" / "b").exists()
    assert "stays" not in said
    membership.add_node(folder, NodeSpec("b"))
    (folder / "nodes" / "b" / "data.jsonl").write_text("{}\n")
    said = membership.remove_node(folder, "b")
    assert [path.name for path in (folder / "nodes" / "b").iterdir()] == ["data.jsonl"]
    assert "What else lies in" in said
    membership.add_node(folder, NodeSpec("b"))
    assert (folder / "nodes" / "b" / "data.jsonl").exists()


def test_the_containers_are_those_of_the_nodes_unless_edited_by_hand(folder: Path) -> None:
    compose = folder / "compose.yaml"
    membership.add_node(folder, NodeSpec("c"))
    membership.remove_node(folder, "a")
    services = [line for line in compose.read_text().splitlines() if line.startswith("  node-")]
    assert services == ["  node-b:", "  node-c:"]
    compose.write_text("services: {}\n")
    assert "by hand" in membership.add_node(folder, NodeSpec("d"))
    assert compose.read_text() == "services: {}\n"


def test_a_node_that_is_taken_out_is_turned_out_of_superlink(folder: Path) -> None:
    flower, keys = FakeFlower(), folder / "server" / "nodes"
    assert enrol(flower, AllowedNodes(keys)) == ["a: let in", "b: let in"]  # type: ignore[arg-type]
    membership.remove_node(folder, "a")
    assert names(folder) == ["b"]
    said = enrol(flower, AllowedNodes(keys))  # type: ignore[arg-type]
    assert said == ["a: turned out, its key is not in the folder", "b: registered"]
    assert [node.name for node in flower.nodes.values()] == ["b"]
    with pytest.raises(ConfigError, match="there is no node 'a'"):
        membership.remove_node(folder, "a")


def test_a_key_that_is_rotated_takes_the_place_of_the_old_one(folder: Path) -> None:
    flower, keys = FakeFlower(), folder / "server" / "nodes"
    enrol(flower, AllowedNodes(keys))  # type: ignore[arg-type]
    before = (folder / "nodes" / "a" / "node.key").read_bytes()
    membership.rotate_key(folder, "a")
    assert (folder / "nodes" / "a" / "node.key").read_bytes() != before
    said = enrol(flower, AllowedNodes(keys))  # type: ignore[arg-type]
    assert said == ["a: turned out, its key is not in the folder", "a: let in", "b: registered"]


def test_a_superlink_that_is_starting_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[int] = []

    class Starting(FakeFlower):
        def listed(self) -> dict[bytes, Any]:
            tries.append(1)
            if len(tries) < 3:
                raise httpx.ConnectError("refused")
            return super().listed()

    monkeypatch.setattr(enrolment, "flower_nodes", lambda _: nullcontext(Starting()))
    monkeypatch.setattr(enrolment, "PAUSE_SECONDS", 0.0)
    allowed = AllowedNodes(folder / "server" / "nodes")
    assert enrolment.enrol_when_up(allowed) == ["a: let in", "b: let in"]
    assert capsys.readouterr().out == "Waiting for SuperLink, 60 s at most.\n"
    tries[:] = []
    with pytest.raises(httpx.ConnectError):
        enrolment.enrol_when_up(allowed, wait_seconds=-1.0)
    assert len(tries) == 1


def test_a_certificate_is_renewed_without_a_change_on_the_nodes(folder: Path) -> None:
    before = {p: p.read_bytes() for p in (folder / "nodes").rglob("*") if p.is_file()}
    pem = (folder / "server" / "server.pem").read_bytes()
    membership.renew_certificate(folder)
    assert (folder / "server" / "server.pem").read_bytes() != pem
    assert all(path.read_bytes() == content for path, content in before.items())
    assert believes(folder, "nodes/a")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # key and certificate are a pair
    context.load_cert_chain(folder / "server" / "server.pem", folder / "server" / "server.key")


def test_nodes_trust_both_authorities_until_the_certificate_follows(folder: Path) -> None:
    membership.renew_authority(folder)
    assert believes(folder, "nodes/a")  # the old certificate
    membership.renew_certificate(folder)
    assert believes(folder, "nodes/a")
    assert believes(folder, "authority")  # signed by the new one


def test_an_authority_that_ends_too_soon_signs_no_more(folder: Path) -> None:
    facts = folder / "deployment.toml"
    facts.write_text(facts.read_text().replace("days = 365", "days = 3651"))
    with pytest.raises(ConfigError, match="replace it first"):
        membership.renew_certificate(folder)


def test_a_folder_that_is_no_deployment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no deployment's folder"):
        membership.add_node(tmp_path, NodeSpec("a"))
    with pytest.raises(ConfigError, match="holds no nodes' keys"):
        list_nodes(tmp_path)


def test_the_list_tells_who_came_and_who_was_refused(folder: Path) -> None:
    server = folder / "server"
    status = {"a": NodeStatus(last_seen=5.0, flower_version="1.41.0", refused=1, sent_bytes=7)}
    write_status(server / "node-status.json", status)
    (server / "runs" / "r-1").mkdir(parents=True)
    refused = [{"who": "b", "reason": "its rows cannot be used"}]
    line = json.dumps({"round": 3, "refused": refused})
    (server / "runs" / "r-1" / "rounds.jsonl").write_text(line + "\n")
    for place in (folder, server):
        a, b = list_nodes(place)
        assert (a["name"], a["last_seen"], a["requests_refused"], a["sent_bytes"]) == ("a", 5, 1, 7)
        assert (b["last_seen"], b["refusals"]) == (None, 1)
        assert b["last_refusal"] == "round 3: its rows cannot be used"
        assert last_refusals([a, b]) == ["b was refused last in round 3: its rows cannot be used"]
