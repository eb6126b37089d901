"""Remove what SuperLink's database keeps of runs that are over: messages, and updates in them.

Flower deletes a message's objects when it was received, leaves those of lost ones, and gives no
space back. Before SuperLink starts no run goes on, so all messages are of runs that are over: the
tables are emptied and the file is written anew, without what was deleted. Nodes, runs and bundles
stay.

    python -m fedpet.deploy.database superlink.db
"""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

__all__ = ["trim_database"]

# Flower's tables of messages and of what they are made of.
_TABLES = (
    *("object_push_session_pending", "object_push_session_roots", "object_push_sessions"),
    *("run_objects", "object_children", "objects", "message_res", "message_ins", "message"),
)


def trim_database(path: Path) -> int:
    """Empty the tables of messages, and give their space back.

    Args:
        path: Of the database; nothing is done where it is absent or in use.

    Returns:
        Bytes that were given back.
    """
    if not path.exists():
        return 0
    before = _size(path)
    try:
        with closing(sqlite3.connect(path, timeout=2.0, isolation_level=None)) as database:
            database.execute("PRAGMA secure_delete = ON")
            found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            known = {name for (name,) in found}
            database.execute("BEGIN EXCLUSIVE")
            for table in _TABLES:
                if table in known:
                    database.execute(f"DELETE FROM {table}")
            database.execute("COMMIT")
            database.execute("VACUUM")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        print(f"{path} was not trimmed: {error}.", file=sys.stderr)
    return before - _size(path)


def _size(path: Path) -> int:
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


if __name__ == "__main__":
    trim_database(Path(sys.argv[1]))
