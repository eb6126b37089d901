"""Uploads, through the real client, to a stand-in of the hub's HTTP API on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from fedpet.errors import InputError, RunError
from fedpet.export import push_to_hub


class StandIn(BaseHTTPRequestHandler):
    """Take what the client posts: a repository, its files and their commit."""

    repositories: dict[str, dict[str, Any]]
    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}"
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.repositories[name] = wanted
            self.answer(200, {"url": f"{address}/{name}", "id": name})
        elif "/preupload/" in self.path:
            files = [one["path"] for one in json.loads(body)["files"]]
            modes = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files
            ]
            self.answer(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            oid = "0" * 40
            self.answer(200, {"commitUrl": f"{address}/me/model/commit/{oid}", "commitOid": oid})
        else:
            self.answer(200, {"warnings": [], "errors": []})  # of the card's front matter

    def do_GET(self) -> None:
        """Tell that a repository is there, to whom may know."""
        known = self.headers.get("Authorization") == "Bearer hf_test"
        self.answer(200 if known else 401, {"id": "me/model", "sha": "0" * 40, "siblings": []})

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    StandIn.repositories, StandIn.files = {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield StandIn
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# It\n")
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    (made / ".lock").write_text("")
    return made


def test_a_folder_is_uploaded_byte_for_byte_but_for_its_lock(
    hub: type[StandIn], folder: Path
) -> None:
    assert push_to_hub(folder, "org/it").endswith("/org/it")
    assert hub.files == {
        name: (folder / name).read_bytes() for name in ("README.md", "adapter_model.safetensors")
    }


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_private_unless_it_is_asked_to_be_public(
    hub: type[StandIn], folder: Path, private: bool
) -> None:
    push_to_hub(folder, "it", private=private)
    [made] = hub.repositories.values()
    told = made.get("private", made.get("visibility") == "private")
    assert told == private


def test_a_hub_that_refuses_is_one_sentence(
    hub: type[StandIn], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RunError, match=r"was not uploaded to 'me/it': .*401"):
        push_to_hub(folder, "me/it")
    assert not hub.files


def test_without_a_token_the_sentence_says_how_to_get_one(
    hub: type[StandIn], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(RunError, match="no token: run `hf auth login`, or set HF_TOKEN"):
        push_to_hub(folder, "it")


def test_offline_and_out_of_reach_are_one_sentence_each(
    hub: type[StandIn], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(RunError, match="was not uploaded to 'it': ConnectError"):
        push_to_hub(folder, "it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE is set: unset it"):
        push_to_hub(folder, "it")


def test_a_folder_that_is_not_there_is_refused(hub: type[StandIn], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        push_to_hub(tmp_path / "absent", "it")
