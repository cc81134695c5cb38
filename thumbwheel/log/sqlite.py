"""The log on one machine: a SQLite file in WAL mode, shared by any number of processes.

Every append is one transaction, synced to disk before it returns (`synchronous=FULL`); group commit is the caller's
(see `group.py`): the more messages in one append, the fewer syncs. Offsets are dense per topic, from 0.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from thumbwheel.errors import LogError
from thumbwheel.log.port import Appended, Headers, Message, Record, Start
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
    """
    ALTER TABLE events ADD COLUMN headers TEXT NOT NULL DEFAULT '[]';
    CREATE TABLE identity (id TEXT NOT NULL);
    INSERT INTO identity VALUES (lower(hex(randomblob(16))));
    """,
)

_COLUMNS = '"offset", id, key, time, value, headers'


class SqliteLog:
    """`Log` on a SQLite file. One partition a topic. A connection a thread."""

    def __init__(self, path: Path, setting: str = "[log] path") -> None:
        """Open, or make, the log at `path`; `setting` is what errors say the path was set by.

        Raises LogError where the file is no log or cannot be written.
        """
        self.path = path
        self._setting = setting
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            self._prepare()
            (self._id,) = self._connection().execute("SELECT id FROM identity").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise LogError(f"cannot open the event log {path} ({setting}): {error}") from error

    def _prepare(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        migrate(self._connection(), MIGRATIONS)

    @property
    def identity(self) -> str:
        return f"sqlite:{self._id}"

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._connect()
            self._configure(connection)
            self._local.connection = connection
            with self._lock:
                self._all.append(connection)
        return connection

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)

    def _configure(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @contextmanager
    def _errors(self, doing: str) -> Iterator[sqlite3.Connection]:
        try:
            yield self._connection()
        except sqlite3.Error as error:
            raise LogError(f"cannot {doing} the event log {self.path} ({self._setting}): {error}") from error

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        with self._errors(doing) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def append(self, topic: str, messages: Sequence[Message]) -> list[Appended]:
        return self.append_all([(topic, message) for message in messages])

    def append_all(self, items: Sequence[tuple[str, Message]]) -> list[Appended]:
        """Append messages to several topics in one durable transaction."""
        with self._transaction("append to") as connection:
            return [self._insert(connection, topic, message) for topic, message in items]

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
        key, headers = _column(message.key), _to_text(message.headers)
        connection.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
            (topic, following - 1, message.id, key, message.time, message.value, headers),
        )
        return Appended(following - 1, duplicate=False)

    def read(self, topic: str, offset: int, limit: int = 500, partition: int = 0) -> list[Record]:
        self._check(partition)
        with self._errors("read") as connection:
            rows = connection.execute(
                f'SELECT {_COLUMNS} FROM events WHERE topic = ? AND "offset" >= ? ORDER BY "offset" LIMIT ?',
                (topic, offset, limit),
            )
            return [_record(topic, row) for row in rows]

    def find(self, topic: str, id: str) -> Record | None:
        """The record of one event id, or None."""
        with self._errors("read") as connection:
            row = connection.execute(
                f"SELECT {_COLUMNS} FROM events WHERE topic = ? AND id = ?", (topic, id)
            ).fetchone()
            return None if row is None else _record(topic, row)

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

    def offset_at(self, topic: str, time: float, partition: int = 0) -> int:
        self._check(partition)
        with self._errors("read") as connection:
            row = connection.execute(
                'SELECT "offset" FROM events WHERE topic = ? AND time >= ? ORDER BY "offset" LIMIT 1', (topic, time)
            ).fetchone()
        return self.ends(topic)[1] if row is None else int(row[0])

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

    def has_committed(self, group: str, topic: str) -> bool:
        """Whether a group ever committed, be it to 0."""
        with self._errors("read") as connection:
            found = connection.execute("SELECT 1 FROM groups WHERE name = ? AND topic = ?", (group, topic)).fetchone()
            return found is not None

    def consumer(self, group: str, topics: Sequence[str], start: Start | None = None) -> "SqliteConsumer":
        return SqliteConsumer(self, group, topics, start)

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


class SqliteConsumer:
    """`Consumer` on a SQLite log. A group has one member here; a second one would get the same records."""

    def __init__(self, log: SqliteLog, group: str, topics: Sequence[str], start: Start | None) -> None:
        self._log = log
        self._group = group
        self._next: dict[str, int] = {}
        for topic in topics:
            own = (start or {}).get((topic, 0))
            self._next[topic] = log.committed(group, topic) if own is None else own

    def poll(self, limit: int = 500) -> list[Record]:
        for topic, offset in self._next.items():
            if records := self._log.read(topic, offset, limit):
                self._next[topic] = records[-1].offset + 1
                return records
        return []

    def commit(self, record: Record) -> None:
        self._log.commit(self._group, record.topic, record.offset + 1)

    def close(self) -> None:
        pass


def _record(topic: str, row: tuple[int, str, str | bytes, float, bytes, str]) -> Record:
    offset, id, key, time, value, headers = row
    text = key if isinstance(key, str) else key.decode(errors="surrogateescape")
    return Record(topic, 0, offset, Message(id, text, time, value, _from_text(headers)))


def _column(key: str) -> str | bytes:
    """A key as SQLite takes it: one that is no UTF-8 (somebody else's, from Kafka) as its bytes."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return key.encode(errors="surrogateescape")
    return key


def _to_text(headers: Headers) -> str:
    """Headers as JSON. Latin-1 gives every byte a character of its own."""
    return json.dumps([(name, value.decode("latin-1")) for name, value in headers]) if headers else "[]"


@lru_cache(256)  # most messages of a gateway have the same ones
def _from_text(text: str) -> Headers:
    return tuple((name, value.encode("latin-1")) for name, value in json.loads(text)) if text != "[]" else ()
