"""The cache: computed once, whole or not at all, and the same for all who ask at once."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fedpet.data import cache
from fedpet.data.cache import Entry, cached
from fedpet.errors import DataError


class Counted:
    """Computes an entry and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Entry:
        self.calls += 1
        return Entry({"a": np.arange(1000), "b": np.ones((2, 3), np.float32)}, {"word": "ä"})


def entry_folder(root: Path) -> Path:
    (folder,) = (root / "kind").iterdir()
    return folder


def test_a_second_request_opens_the_same_bytes_and_computes_nothing(tmp_path: Path) -> None:
    compute = Counted()
    first = cached(tmp_path, "kind", {"k": 1}, compute)
    second = cached(tmp_path, "kind", {"k": 1}, compute)
    assert compute.calls == 1
    assert second.meta == first.meta == {"word": "ä"}
    for name, array in compute().arrays.items():
        assert second.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(second.arrays[name], array)


def test_another_key_is_another_entry(tmp_path: Path) -> None:
    compute = Counted()
    for key in ({"k": 1}, {"k": 2}, {"k": "1"}, {"k": 1, "l": None}):
        cached(tmp_path, "kind", key, compute)
    assert compute.calls == 4


def test_what_an_older_format_made_is_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Counted()
    cached(tmp_path, "kind", {"k": 1}, compute)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    cached(tmp_path, "kind", {"k": 1}, compute)
    assert compute.calls == 2


def test_stored_arrays_cannot_be_written_through(tmp_path: Path) -> None:
    entry = cached(tmp_path, "kind", {}, Counted())
    with pytest.raises(ValueError, match="read-only"):
        entry.arrays["a"][0] = 7


@pytest.mark.parametrize("name", ["a.npy", "meta.json"])
@pytest.mark.parametrize("size", [0, 20, None])
def test_a_damaged_entry_is_computed_anew(tmp_path: Path, name: str, size: int | None) -> None:
    compute = Counted()
    cached(tmp_path, "kind", {}, compute)
    damaged = entry_folder(tmp_path) / name
    if size is None:
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:size])
    entry = cached(tmp_path, "kind", {}, compute)
    assert compute.calls == 2
    np.testing.assert_array_equal(entry.arrays["a"], np.arange(1000))


def test_two_who_compute_at_once_both_get_the_entry_and_leave_one_folder(tmp_path: Path) -> None:
    both_have_missed = threading.Barrier(2)

    def compute() -> Entry:
        both_have_missed.wait(timeout=10)
        return Counted()()

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(cached, tmp_path, "kind", {}, compute) for _ in range(2)]
        entries = [one.result() for one in asked]
    for entry in entries:
        np.testing.assert_array_equal(entry.arrays["a"], np.arange(1000))
    assert entry_folder(tmp_path).is_dir()  # one, and no half-built one beside it


def test_a_computation_that_fails_leaves_nothing_and_tells_its_own_error(tmp_path: Path) -> None:
    def compute() -> Entry:
        raise DataError("row 3 is bad.")

    with pytest.raises(DataError, match=r"^row 3 is bad\.$"):
        cached(tmp_path, "kind", {}, compute)
    assert list(tmp_path.rglob("*")) == []


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"the cache '.*file' cannot be written: .*run\.cache"):
        cached(tmp_path / "file", "kind", {}, Counted())


# One cache, several users.


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize(("umask", "expected"), [(0o022, {0o755, 0o644}), (0o077, {0o700, 0o600})])
def test_an_entry_is_readable_by_whom_the_umask_lets_read(
    tmp_path: Path, umask: int, expected: set[int]
) -> None:
    before = os.umask(umask)
    try:
        cached(tmp_path, "kind", {}, Counted())
    finally:
        os.umask(before)
    assert modes(entry_folder(tmp_path)) == expected


@pytest.mark.parametrize("mode", [0o1777, 0o2775, 0o755])
def test_users_who_share_the_root_share_what_is_below(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(mode)
    cached(root, "kind", {}, Counted())
    assert stat.S_IMODE((root / "kind").stat().st_mode) == mode


def test_a_cache_that_cannot_be_written_answers_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Counted()
    cached(tmp_path, "kind", {"k": 1}, compute)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("mkdir", "rename", "rmdir", "unlink", "chmod", "utime"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert cached(tmp_path, "kind", {"k": 1}, compute).meta == {"word": "ä"}
    assert compute.calls == 1
    with pytest.raises(DataError, match=r"cannot be written: Permission denied\. Name a folder"):
        cached(tmp_path, "kind", {"k": 2}, compute)


def test_a_damaged_entry_that_cannot_be_replaced_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(tmp_path, "kind", {}, Counted())
    (entry_folder(tmp_path) / "a.npy").write_bytes(b"")
    monkeypatch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)  # it is another user's
    with pytest.raises(DataError, match="cannot be written"):
        cached(tmp_path, "kind", {}, Counted())


def test_a_key_follows_the_format_and_not_the_source_of_the_package(tmp_path: Path) -> None:
    cached(tmp_path, "kind", {"k": 1}, Counted())
    key = json.dumps({"format": cache.FORMAT, "k": 1})
    assert entry_folder(tmp_path).name == hashlib.sha256(key.encode()).hexdigest()[:32]
