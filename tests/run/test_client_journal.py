"""The journal of clients: what is read is what was recorded, whenever the process ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpet.errors import ConfigError, RunError
from fedpet.run import client_journal
from fedpet.run.client_journal import ClientJournal, read_records, remove_client_journals
from fedpet.server.client_records import ClientRecord, ClientRecords

NAMES = [f"client {number}é" for number in range(6)]
STEPS = {
    "asked": lambda records, name, at: records.clients_with_plan.update([name]),
    "registered": lambda records, name, at: records.clients_with_plan.add(name),
    "lost": lambda records, name, at: records.clients_with_plan.discard(name),
    "answered": lambda records, name, at: records.answered(7, name, at % 3, at),
    "accepted": lambda records, name, at: records.accepted.update({name: at}),
    "set": lambda records, name, at: records.accepted.__setitem__(name, at),
    "no residual": lambda records, name, at: records.accepted.pop(name, None),
    "other tier": lambda records, name, at: records.keep_tier(name, at % 3),
    "forgot": lambda records, name, at: records.forget_clients([name]),
    "cleared": lambda records, name, at: records.accepted.clear(),
}
steps = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from(NAMES)), max_size=8)


def after(records: ClientRecords, done: list[tuple[str, str]], at: int) -> ClientRecords:
    for step, name in done:
        STEPS[step](records, name, at)
    return records


@given(rounds=st.lists(steps, min_size=1, max_size=6), restarts=st.sets(st.integers(0, 5)))
def test_records_are_read_back_after_every_round_and_restart(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[Any], restarts: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    records, journal = ClientRecords(NAMES), ClientJournal(folder)
    for at, done in enumerate(rounds, start=1):
        written = journal.write(after(records, done, at))
        journal.remove_older()
        assert read_records(folder, written) == records.all_records()
        if at in restarts:
            before, records, journal = records, ClientRecords(NAMES), ClientJournal(folder)
            records.load_records(read_records(folder, written))
            assert records.all_records() == before.all_records()
    remove_client_journals(folder)
    assert not list(folder.iterdir())


def test_a_round_writes_the_records_of_its_clients_and_of_nobody_else(tmp_path: Path) -> None:
    lengths = []
    for count in (100, 5000):
        names = [f"{number:05d}" for number in range(count)]
        records, journal = ClientRecords(names), ClientJournal(tmp_path)
        records.clients_with_plan.update(names)
        first = journal.write(records)
        records.accepted.update(dict.fromkeys(names[3:6], 9))
        lengths.append(journal.write(records).num_bytes - first.num_bytes)
        assert journal.write(records).num_bytes == first.num_bytes + lengths[-1]
    assert lengths[0] == lengths[1] < 100


def test_a_file_of_changes_is_begun_anew_and_the_old_one_stays_until_a_journal_names_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_journal, "_LEAST_BYTES", 400)
    records, journal = ClientRecords(NAMES), ClientJournal(tmp_path)
    before = journal.write(records)
    for at in range(1, 60):
        now = journal.write(after(records, [("answered", NAMES[at % 6])], at))
        assert read_records(tmp_path, now) == records.all_records()
        if now.file != before.file:
            assert read_records(tmp_path, before)
            journal.remove_older()
            assert [path.name for path in tmp_path.iterdir()] == [now.file]
        assert now.num_bytes < 400 + 3 * 400
        before = now
    assert before.file != "journal.clients-1"


def test_what_a_crash_left_behind_the_valid_part_is_not_read(tmp_path: Path) -> None:
    records, journal = ClientRecords(NAMES), ClientJournal(tmp_path)
    written = journal.write(after(records, [("asked", NAMES[0])], 1))
    expected = records.all_records()
    journal.write(after(records, [("answered", NAMES[1])], 2))  # no journal names it yet
    with (tmp_path / written.file).open("ab") as file:
        file.write(b'{"client')
    assert read_records(tmp_path, written) == expected
    later = ClientRecords(NAMES)
    later.load_records(expected)
    again = ClientJournal(tmp_path).write(later)
    assert again.file != written.file  # the torn one is not gone on with
    assert read_records(tmp_path, again) == expected


@pytest.mark.parametrize("harm", ["absent", "short", "changed"])
def test_a_damaged_file_is_refused_by_its_name(tmp_path: Path, harm: str) -> None:
    written = ClientJournal(tmp_path).write(after(ClientRecords(NAMES), [("asked", NAMES[0])], 1))
    path = tmp_path / written.file
    if harm == "absent":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] if harm == "short" else content.replace(b"true", b"null"))
    with pytest.raises(ConfigError, match=rf"{written.file}.*(cannot be read|damaged)"):
        read_records(tmp_path, written)


def test_records_of_other_clients_are_refused() -> None:
    records = {"somebody": ClientRecord(has_plan=True)}
    with pytest.raises(RunError, match="'somebody' is none of the 6 here"):
        ClientRecords(NAMES).load_records(records)
    ClientRecords([]).load_records(records)  # a deployment, to which nobody has come back yet
