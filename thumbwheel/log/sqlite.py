"""The log on one machine: a SQLite file in WAL mode, shared by any number of processes.

Every append is one transaction, synced to disk before it returns (`synchronous=FULL`); group commit is the caller's
(see `group.py`): the more messages in one append, the fewer syncs. Offsets are dense per topic, from 0.
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from thumbwheel.errors import LogError
from thumbwheel.log.port import Appended, Message, Record
from thumbwheel.migrations import migrate

MIGRATIONS = (
    """
    CREATE TABLE events (
        topic TEXT NOT NULL,
        "offset" INTEGER NOT NULL,
        id TEXT NOT NULL,
        key TEXT NOT NULL,
        time REAL NOT NULL,
        value BLOB NOT NULL,
        PRIMARY KEY (topic, "offset")
    );
    CREATE UNIQUE INDEX events_by_id ON events (topic, id);
    CREATE TABLE topics (topic TEXT PRIMARY KEY, next INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE groups (
        name TEXT NOT NULL, topic TEXT NOT NULL, "offset" INTEGER NOT NULL, PRIMARY KEY (name, topic)
    ) WITHOUT ROWID;
    """,
)


class SqliteLog:
    """`Log` on a SQLite file. One partition a topic. A connection a thread."""

    def __init__(self, path: Path) -> None:
        """Open, or make, the log at `path`. Raises LogError where the file is no log or cannot be written."""
        self.path = path
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            migrate(self._connection(), MIGRATIONS)
        except (OSError, sqlite3.Error) as error:
            raise LogError(f"cannot open the event log {path} ([log] path): {error}") from error

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            self._local.connection = connection
            with self._lock:
                self._all.append(connection)
        return connection

    @contextmanager
    def _errors(self, doing: str) -> Iterator[sqlite3.Connection]:
        try:
            yield self._connection()
        except sqlite3.Error as error:
            raise LogError(f"cannot {doing} the event log {self.path} ([log] path): {error}") from error

    def append(self, topic: str, messages: Sequence[Message]) -> list[Appended]:
        return self.append_all([(topic, message) for message in messages])

    def append_all(self, items: Sequence[tuple[str, Message]]) -> list[Appended]:
        """Append messages to several topics in one durable transaction."""
        with self._errors("append to") as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                appended = [self._insert(connection, topic, message) for topic, message in items]
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return appended

    @staticmethod
    def _insert(connection: sqlite3.Connection, topic: str, message: Message) -> Appended:
        there = connection.execute(
            'SELECT "offset" FROM events WHERE topic = ? AND id = ?', (topic, message.id)
        ).fetchone()
        if there is not None:
            return Appended(there[0], duplicate=True)
        (following,) = connection.execute(
            "INSERT INTO topics VALUES (?, 1) ON CONFLICT DO UPDATE SET next = next + 1 RETURNING next", (topic,)
        ).fetchone()
        connection.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)",
            (topic, following - 1, message.id, message.key, message.time, message.value),
        )
        return Appended(following - 1, duplicate=False)

    def read(self, topic: str, offset: int, limit: int = 500, partition: int = 0) -> list[Record]:
        self._check(partition)
        with self._errors("read") as connection:
            rows = connection.execute(
                'SELECT "offset", id, key, time, value FROM events WHERE topic = ? AND "offset" >= ?'
                ' ORDER BY "offset" LIMIT ?',
                (topic, offset, limit),
            )
            return [Record(topic, 0, row[0], Message(*row[1:])) for row in rows]

    def find(self, topic: str, id: str) -> Record | None:
        """The record of one event id, or None."""
        with self._errors("read") as connection:
            row = connection.execute(
                'SELECT "offset", id, key, time, value FROM events WHERE topic = ? AND id = ?', (topic, id)
            ).fetchone()
            return None if row is None else Record(topic, 0, row[0], Message(*row[1:]))

    def partitions(self, topic: str) -> int:
        return 1

    def ends(self, topic: str, partition: int = 0) -> tuple[int, int]:
        self._check(partition)
        with self._errors("read") as connection:
            first, following = connection.execute(
                'SELECT (SELECT min("offset") FROM events WHERE topic = ?1),'
                " (SELECT next FROM topics WHERE topic = ?1)",
                (topic,),
            ).fetchone()
            end = following or 0
            return (end if first is None else first, end)

    def commit(self, group: str, topic: str, offset: int, partition: int = 0) -> None:
        self._check(partition)
        with self._errors("commit to") as connection:
            connection.execute(
                'INSERT INTO groups VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "offset" = excluded."offset"',
                (group, topic, offset),
            )

    def committed(self, group: str, topic: str, partition: int = 0) -> int:
        self._check(partition)
        with self._errors("read") as connection:
            row = connection.execute(
                'SELECT "offset" FROM groups WHERE name = ? AND topic = ?', (group, topic)
            ).fetchone()
            return 0 if row is None else int(row[0])

    @staticmethod
    def _check(partition: int) -> None:
        if partition != 0:
            raise LogError(f"the SQLite log has partition 0 alone, not {partition}")

    def close(self) -> None:
        with self._lock:
            for connection in self._all:
                connection.close()
            self._all.clear()
        self._local = threading.local()
