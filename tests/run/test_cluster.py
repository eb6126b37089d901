"""Test the check of Ray's place: one sentence, before anything is made."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Silent

from fedpet.config import Experiment
from fedpet.errors import ConfigError, RunError
from fedpet.run import ray_cluster, ray_engine
from fedpet.run.ray_cluster import LONGEST_FOLDER, cluster_address, ray_folder


@pytest.fixture
def nobody() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    folder = tmp_path / ("x" * LONGEST_FOLDER)
    folder.mkdir()
    return folder


@pytest.fixture
def ends_early(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[type[Exception], str], None]:
    """Runs, and searches, and expects an error before rows are read or a folder comes to be."""
    monkeypatch.setattr(ray_engine, "prepare", lambda *_, **__: pytest.fail("rows were read"))

    def check(kind: type[Exception], words: str) -> None:
        settled = experiment()
        with pytest.raises(kind, match=words):
            ray_engine.simulate(settled, Silent())
        assert not Path(settled.run.out).exists()
        with pytest.raises(kind, match=words):
            ray_engine.search(settled, tmp_path / "found.json", Silent())
        assert not list(tmp_path.glob("found*"))

    return check


# -- RAY_ADDRESS -----------------------------------------------------------------------------


def test_a_dead_cluster_is_told_at_once_and_leaves_no_folder(
    nobody: str,
    monkeypatch: pytest.MonkeyPatch,
    ends_early: Callable[[type[Exception], str], None],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    ends_early(RunError, f"no Ray cluster answers at {nobody}.*unset RAY_ADDRESS")


def test_auto_without_a_cluster_and_beside_a_dead_one_s_file_is_told(
    nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = pytest.importorskip("ray._private.services")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", set)  # whatever else runs here
    with pytest.raises(RunError, match="'auto', and no Ray cluster runs"):
        cluster_address()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(nobody)
    with pytest.raises(RunError, match=f"answers at {nobody}, where RAY_ADDRESS='auto' leads"):
        cluster_address()


@pytest.mark.parametrize("address", ["head", "head:port", ":6379", "head:99999"])
def test_what_is_no_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match="must be host:port"):
        cluster_address()


@pytest.mark.parametrize("address", ["ray://", "ray://head", "ray://127.0.0.1:10001"])
def test_an_address_of_ray_s_client_is_refused_with_the_place_to_start_from(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match="start it there, with RAY_ADDRESS=HOST:6379"):
        cluster_address()


@pytest.mark.parametrize("address", ["", "local"])
def test_no_address_and_local_start_a_cluster_here(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() is None


def test_a_cluster_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert cluster_address() == address


# -- RAY_TMPDIR and TMPDIR -------------------------------------------------------------------


def test_an_absent_ray_tmpdir_is_refused_and_leaves_no_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends_early: Callable[[type[Exception], str], None],
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "absent"))
    ends_early(ConfigError, "RAY_TMPDIR=.*absent' is no folder")
    (tmp_path / "absent").write_text("a file")
    ends_early(ConfigError, "RAY_TMPDIR=.*absent' is no folder")


def test_a_ray_tmpdir_that_is_too_long_is_refused_with_the_length(
    long_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder))
    with pytest.raises(ConfigError, match=f"at most {LONGEST_FOLDER} bytes.*a shorter one"):
        ray_folder()


def test_where_tmpdir_is_too_long_a_short_folder_is_taken_or_asked_for(
    long_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder))
    assert ray_folder() == ray_cluster.FALLBACK
    monkeypatch.setattr(ray_cluster, "FALLBACK", long_folder / "absent")
    with pytest.raises(ConfigError, match="Name a short folder with RAY_TMPDIR"):
        ray_folder()


def test_the_paths_that_ray_makes_in_the_longest_folder_still_fit() -> None:
    ray_utils = pytest.importorskip("ray._private.utils")
    folder = "/" + "x" * (LONGEST_FOLDER - 1)
    session = f"session_2026-12-31_23-59-59_999999_{os.getpid()}"
    path = f"{folder}/fedpet-12345678/{session}/sockets/plasma_store"
    ray_utils.validate_socket_filepath(path)
    with pytest.raises(OSError, match="AF_UNIX"):
        ray_utils.validate_socket_filepath(f"/x{path[1:]}")


# -- where it fails later --------------------------------------------------------------------


def test_a_ray_that_does_not_start_leaves_no_empty_run_folder(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")

    def init(**options: object) -> None:
        raise ValueError("no room")

    monkeypatch.setattr(ray, "init", init)
    settled = experiment()
    with pytest.raises(RunError, match="Ray did not start: no room"):
        ray_engine.simulate(settled, Silent())
    assert not Path(settled.run.out).exists()
    with pytest.raises(RunError, match="Ray did not start: no room"):
        ray_engine.search(experiment(search_budget=600), tmp_path / "found.json", Silent())
    assert not list(tmp_path.glob("found*"))
