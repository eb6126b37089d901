"""SuperLink's database at its start: nothing of an update is left in it, and nodes stay."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from flwr.supercore.state.schema import corestate_models, linkstate_models, objectstore_models

from fedpet.deploy.database import _TABLES, trim_database

SECRET = b"an update" * 5000


def make(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        for table in ("objects", "node"):
            database.execute(f"CREATE TABLE {table} (content BLOB)")
            database.execute(f"INSERT INTO {table} VALUES (?)", (SECRET,))
        database.execute("UPDATE node SET content = 'a'")
        database.commit()


def test_updates_are_gone_from_the_file_and_nodes_stay(tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    make(path)
    assert trim_database(path) > len(SECRET) // 2
    assert not [part for part in tmp_path.iterdir() if SECRET[:90] in part.read_bytes()]
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT content FROM node").fetchall() == [("a",)]
        assert database.execute("SELECT count(*) FROM objects").fetchall() == [(0,)]


def test_a_database_in_use_or_absent_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trim_database(tmp_path / "superlink.db") == 0
    path = tmp_path / "superlink.db"
    make(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        trim_database(path)
    assert "was not trimmed: database is locked" in capsys.readouterr().err
    (tmp_path / "no.db").write_bytes(b"no database" * 99)
    trim_database(tmp_path / "no.db")


def test_the_tables_are_flower_s() -> None:
    known = {
        found.__tablename__
        for models in (corestate_models, linkstate_models, objectstore_models)
        for found in vars(models).values()
        if hasattr(found, "__tablename__")
    }
    assert set(_TABLES) <= known
