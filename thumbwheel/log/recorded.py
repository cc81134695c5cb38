"""A SQLite log that is only read: no byte of it changes, and no file is left beside it.

A usual connection does neither: the last one that closes a file moves what waits in its WAL into it, and one that may
not write leaves an empty WAL behind.
"""

import sqlite3
from pathlib import Path

from thumbwheel.log.sqlite import MIGRATIONS, SqliteLog


class RecordedLog(SqliteLog):
    """`Log` for reading. Programs that have it open go on, and what they append is seen. Appends and commits fail."""

    def __init__(self, path: Path, setting: str) -> None:
        """`setting` is what errors say the path was given by. Raises LogError where it is no log of this release."""
        super().__init__(path, setting)

    def _prepare(self) -> None:
        if not self.path.is_file():
            raise FileNotFoundError("there is no such file")
        db, known = self._connection(), len(MIGRATIONS)
        (tables,) = db.execute(
            "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('events', 'topics', 'groups')"
        ).fetchone()
        (schema,) = db.execute("PRAGMA user_version").fetchone()
        if tables < 3:
            raise sqlite3.DatabaseError("a SQLite file, but no event log")
        if schema > known:
            raise sqlite3.DatabaseError(f"written by a newer release: schema {schema}, this one knows {known}")
        if schema < known:
            raise sqlite3.DatabaseError(
                "written by an older release: copy it, and `THUMBWHEEL_LOG__PATH=/the/copy thumbwheel log init` brings "
                "the copy up to date"
            )

    def _connect(self) -> sqlite3.Connection:
        # Where there is no WAL, nobody has it open.
        mode = "mode=ro" if Path(f"{self.path}-wal").exists() else "immutable=1"
        uri = f"{self.path.absolute().as_uri()}?{mode}"
        return sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False)

    def _configure(self, connection: sqlite3.Connection) -> None:
        """It stays as it was set."""
