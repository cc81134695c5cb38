"""Ordered migrations for SQLite files; `PRAGMA user_version` says how many a file has had."""

import sqlite3
from collections.abc import Sequence


def migrate(connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
    """Bring a file up to date. The connection is in autocommit mode; several processes may do this at once.

    Raises sqlite3.DatabaseError where the file was written by a newer release.
    """
    if _version(connection) == len(migrations):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        done = _version(connection)
        if done > len(migrations):
            raise sqlite3.DatabaseError(f"written by a newer release: schema {done}, this one knows {len(migrations)}")
        for script in migrations[done:]:
            for statement in script.split(";"):
                if statement.strip():
                    connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
