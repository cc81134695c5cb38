"""What a gateway acknowledged, until Kafka has it: a SQLite log with an end to its patience.

What waits is bounded on disk. Over the limit the oldest responses without a vote go first, then the oldest with one;
votes and reports are never dropped: when they alone fill the file, appends fail, so that nobody is told that a vote is
safe which is not. What was dropped is counted in the file.
"""

import bisect
import itertools
import math
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, RESPONSES
from thumbwheel.log.deadletter import dlq
from thumbwheel.log.port import Appended, Message, Record
from thumbwheel.log.sqlite import SqliteLog

FORWARDER = "forwarder"
"""The group that stands for what Kafka has."""
HEADROOM = 1.05
"""Appends have to make room themselves at this many times the limit: by then whoever trims has had its chance."""
_AT_ONCE = 100
_PAUSE_S = 0.01
"""One transaction removes so many rows, and then there is a pause: a vote may be waiting for the lock."""

_WITHOUT_VOTE = f"NOT EXISTS (SELECT 1 FROM events AS vote WHERE vote.topic = '{FEEDBACK}' AND vote.key = events.key)"


class Outbox(SqliteLog):
    """Written by one gateway, emptied by one forwarder."""

    def __init__(self, path: Path, limit: int) -> None:
        """`limit` is in bytes. Raises LogError as `SqliteLog` does."""
        self.limit = limit
        self._voted_up_to = 0  # no response before this offset is without a vote
        super().__init__(path, "[log] outbox")
        with self._errors("open") as db:
            db.execute(f"CREATE INDEX IF NOT EXISTS votes_by_key ON events (key) WHERE topic = '{FEEDBACK}'")
            db.execute(
                "CREATE TABLE IF NOT EXISTS dropped (topic TEXT NOT NULL, reason TEXT NOT NULL,"
                " count INTEGER NOT NULL, PRIMARY KEY (topic, reason)) WITHOUT ROWID"
            )

    def append_all(self, items: Sequence[tuple[str, Message]]) -> list[Appended]:
        """As every log does. In a file that is full the oldest that may go makes room; raises LogError if none may."""
        size = sum(len(message.value) for _, message in items)
        while (over := self.bytes() + size - int(self.limit * HEADROOM)) > 0:
            if self._make_room(over // 2) is None:
                raise LogError(
                    f"the outbox {self.path} is full ([log] outbox_max_bytes, {self.limit}) of votes that Kafka has "
                    "not got yet; the forwarder's log says why"
                )
        return super().append_all(items)

    def bytes(self) -> int:
        """How much of the file is in use."""
        with self._errors("read") as db:
            pages, free, size = (
                db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
            )
            return int((pages - free) * size)

    def waiting(self, topic: str) -> tuple[int, float]:
        """How many messages Kafka has not got yet, and the time of the oldest (0 where none waits)."""
        with self._errors("read") as db:
            start = self.committed(FORWARDER, topic)
            (count,) = db.execute(
                'SELECT count(*) FROM events WHERE topic = ? AND "offset" >= ?', (topic, start)
            ).fetchone()
            oldest = db.execute(
                'SELECT time FROM events WHERE topic = ? AND "offset" >= ? ORDER BY "offset" LIMIT 1', (topic, start)
            ).fetchone()
        return int(count), oldest[0] if oldest else 0.0

    def next(self, topic: str, limit: int, size: int) -> list[Record]:
        """What is to be sent next: up to `limit` messages, and `size` bytes of them or one message."""
        start = self.committed(FORWARDER, topic)
        with self._errors("read") as db:
            ahead = db.execute(
                'SELECT "offset", length(value) FROM events'
                ' WHERE topic = ? AND "offset" >= ? ORDER BY "offset" LIMIT ?',
                (topic, start, limit),
            ).fetchall()
        count = _within(size, [length for _, length in ahead])
        return self.read(topic, ahead[0][0], count) if ahead else []

    def sent(self, topic: str, record: Record) -> None:
        """Kafka has everything up to this record. Votes stay for `forget`; the rest has no more use here."""
        with self._transaction("commit to") as db:
            db.execute(
                'INSERT INTO groups VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "offset" = excluded."offset"',
                (FORWARDER, topic, record.offset + 1),
            )
            if topic != FEEDBACK:
                db.execute('DELETE FROM events WHERE topic = ? AND "offset" <= ?', (topic, record.offset))

    def shelve(self, topic: str, message: Message) -> None:
        """Take a message out of the queue that Kafka will never accept, and keep it here among the dead letters."""
        with self._transaction("append to") as db:
            self._insert(db, dlq(topic), message)
            db.execute("DELETE FROM events WHERE topic = ? AND id = ?", (topic, message.id))
            self._count(db, topic, "too_large", 1)

    def forget(self, before: float) -> None:
        """Remove votes that Kafka has and that are older than a time (Unix seconds)."""
        while self._forget_some(before):
            time.sleep(_PAUSE_S)

    def trim(self) -> int:
        """Hold the file to its limit; returns how many responses were dropped for it.

        Half of what is too much goes at each turn: a page of the file may hold less than half of its size.
        """
        dropped = 0
        while (over := self.bytes() - self.limit) > 0 and (gone := self._make_room(over // 2)) is not None:
            dropped += gone
            time.sleep(_PAUSE_S)
        return dropped

    def _make_room(self, size: int) -> int | None:
        """Remove a few of what may go first; returns how many waiting responses those were, None where nothing may go.

        A vote that Kafka has is no loss, but it says of its response, if that still waits, that it has one: only those
        go first that are older than every response that waits.
        """
        with self._errors("read") as db:
            oldest = db.execute(
                'SELECT time FROM events WHERE topic = ? ORDER BY "offset" LIMIT 1', (RESPONSES,)
            ).fetchone()
        if self._forget_some(oldest[0] if oldest else math.inf):
            return 0
        if shelved := self._oldest(dlq(RESPONSES), 0, size):
            self._remove(dlq(RESPONSES), shelved)
            return 0
        end = self.ends(RESPONSES)[1]
        without_vote = self._oldest(RESPONSES, self._voted_up_to, size, _WITHOUT_VOTE)
        self._voted_up_to = without_vote[-1] + 1 if without_vote else end
        if without_vote:
            return self._remove(RESPONSES, without_vote, _WITHOUT_VOTE, "outbox_full")
        if voted := self._oldest(RESPONSES, 0, size):
            return self._remove(RESPONSES, voted, reason="outbox_full")
        return None

    def _forget_some(self, before: float) -> int:
        end = self.committed(FORWARDER, FEEDBACK)
        with self._errors("read") as db:
            votes = db.execute(
                'SELECT "offset", time FROM events WHERE topic = ? AND "offset" < ? ORDER BY "offset" LIMIT ?',
                (FEEDBACK, end, _AT_ONCE),
            ).fetchall()
        old = [offset for offset, time in votes if time < before]
        return self._remove(FEEDBACK, old) if old else 0

    def _oldest(self, topic: str, start: int, size: int, condition: str = "TRUE") -> list[int]:
        """Offsets, of `size` bytes of messages or one. Found before the lock is taken: this may look at many rows."""
        with self._errors("read") as db:
            rows = db.execute(
                f'SELECT "offset", length(value) FROM events WHERE topic = ? AND "offset" >= ? AND {condition}'
                ' ORDER BY "offset" LIMIT ?',
                (topic, start, _AT_ONCE),
            ).fetchall()
        return [offset for offset, _ in rows[: _within(size, [length for _, length in rows])]]

    def _remove(self, topic: str, offsets: Sequence[int], condition: str = "TRUE", reason: str = "") -> int:
        """In one transaction, those that still meet the condition; counted where there is a reason."""
        with self._transaction("trim") as db:
            gone = db.executemany(
                f'DELETE FROM events WHERE topic = ? AND "offset" = ? AND {condition}',
                [(topic, offset) for offset in offsets],
            ).rowcount
            if reason:
                self._count(db, topic, reason, gone)
            return gone

    @staticmethod
    def _count(db: sqlite3.Connection, topic: str, reason: str, count: int) -> None:
        db.execute(
            "INSERT INTO dropped VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            (topic, reason, count),
        )

    def dropped(self) -> Sequence[tuple[str, str, int]]:
        """Topic, reason and how many, of all that this file ever dropped."""
        with self._errors("read") as db:
            return db.execute("SELECT topic, reason, count FROM dropped").fetchall()


def _within(size: int, lengths: Sequence[int]) -> int:
    """How many of the first lengths add up to `size` at most; one at least, where there is one."""
    count = bisect.bisect_right(list(itertools.accumulate(lengths)), size)
    return max(count, min(1, len(lengths)))
