"""The learner's own SQLite file: what it has read off the log, and what became of each vote.

Events, the standing of the votes that they touch and the offset that they came from land in one transaction: killed at
any moment, it goes on where it was, and a record that is read twice changes nothing. What has been *learned* is decided
by the checkpoint; `learned` here repeats it, before anything else is read.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from learner.admission import HELD_OUT, admit
from learner.join import Vote, join
from thumbwheel.errors import ThumbwheelError
from thumbwheel.events import FeedbackSubmitted, ResponseGenerated, decode
from thumbwheel.log import Record
from thumbwheel.migrations import migrate

MIGRATIONS = (
    """
    CREATE TABLE offsets (
        topic TEXT NOT NULL, partition INTEGER NOT NULL, "offset" INTEGER NOT NULL, PRIMARY KEY (topic, partition)
    ) WITHOUT ROWID;
    CREATE TABLE responses (response_id TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE answers (
        response_id TEXT NOT NULL,
        choice_index INTEGER NOT NULL,
        prompt TEXT NOT NULL,
        completion TEXT NOT NULL,
        problem TEXT,
        PRIMARY KEY (response_id, choice_index)
    );
    CREATE INDEX answers_by_problem ON answers (problem);
    CREATE TABLE votes (
        feedback_id TEXT PRIMARY KEY,
        response_id TEXT NOT NULL,
        choice_index INTEGER NOT NULL,
        user TEXT NOT NULL,
        up INTEGER,
        time REAL NOT NULL,
        state TEXT NOT NULL,
        reason TEXT
    );
    CREATE INDEX votes_by_response ON votes (response_id);
    CREATE INDEX votes_by_state ON votes (state, up, time);
    CREATE TABLE unreadable (
        topic TEXT NOT NULL,
        partition INTEGER NOT NULL,
        "offset" INTEGER NOT NULL,
        reason TEXT NOT NULL,
        PRIMARY KEY (topic, partition, "offset")
    );
    """,
)


@dataclass(frozen=True, slots=True)
class Example:
    """A vote that is ready, with the answer that it is about."""

    feedback_id: str
    prompt: list[int]
    completion: list[int]
    up: bool


class Buffer:
    """One process writes it at a time."""

    def __init__(self, path: Path, vocabulary: int, held_out: Callable[[list[int]], bool]) -> None:
        """Open or make the file. `held_out` says which prompts are kept for measuring. Raises ThumbwheelError."""
        self._vocabulary = vocabulary
        self._held_out = held_out
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            migrate(self._db, MIGRATIONS)
        except (OSError, sqlite3.Error) as error:
            raise ThumbwheelError(f"cannot open the learner's buffer {path}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def offset(self, topic: str, partition: int = 0) -> int:
        """Where reading goes on."""
        row = self._db.execute(
            'SELECT "offset" FROM offsets WHERE topic = ? AND partition = ?', (topic, partition)
        ).fetchone()
        return int(row[0]) if row else 0

    def consume(self, records: Sequence[Record]) -> None:
        """Take in records of one topic and partition, in order, together with where they end. What was there stays."""
        if not records:
            return
        with self._transaction():
            touched = {key for record in records if (key := self._take(record)) is not None}
            last = records[-1]
            self._db.execute(
                'INSERT INTO offsets VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "offset" = excluded."offset"',
                (last.topic, last.partition, last.offset + 1),
            )
            self._join(touched)

    def _take(self, record: Record) -> str | None:
        """Store one record; returns the id of the response that it is about."""
        try:
            event = decode(record.message.value)
        except ValueError as error:
            place = (record.topic, record.partition, record.offset)
            self._db.execute("INSERT OR IGNORE INTO unreadable VALUES (?, ?, ?, ?)", (*place, str(error)))
            return None
        if isinstance(event, ResponseGenerated):
            self._db.execute("INSERT OR IGNORE INTO responses VALUES (?)", (event.response_id,))
            self._db.executemany(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)",
                [
                    (event.response_id, a.choice_index, json.dumps(a.prompt), json.dumps(a.completion), a.problem)
                    for a in admit(event, self._vocabulary, self._held_out)
                ],
            )
            return event.response_id
        if isinstance(event, FeedbackSubmitted):
            up = None if event.retracted or event.rating is None else event.rating == "up"
            self._db.execute(
                "INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, 'waiting', NULL) ON CONFLICT DO UPDATE SET"
                " response_id = excluded.response_id, choice_index = excluded.choice_index, user = excluded.user,"
                " up = excluded.up, time = excluded.time WHERE response_id = ''",
                (event.id, event.response_id, event.choice_index, event.user, up, event.time),
            )
            return event.response_id
        return None

    def _join(self, touched: Iterable[str]) -> None:
        for response_id in touched:
            one = (response_id,)
            arrived = self._db.execute("SELECT response_id FROM responses WHERE response_id = ?", one).fetchall()
            answers = self._db.execute("SELECT choice_index, problem FROM answers WHERE response_id = ?", one)
            votes = self._db.execute(
                "SELECT feedback_id, choice_index, user, up, time, state = 'learned' FROM votes WHERE response_id = ?",
                one,
            )
            standings = join(
                [
                    Vote(id, response_id, index, user, None if up is None else bool(up), time, bool(learned))
                    for id, index, user, up, time, learned in votes
                ],
                {(response_id, index): problem for index, problem in answers},
                {row[0] for row in arrived},
            )
            self._db.executemany(
                "UPDATE votes SET state = ?, reason = ? WHERE feedback_id = ? AND state != 'learned'",
                [(standing.state, standing.reason, standing.feedback_id) for standing in standings.values()],
            )

    def learned(self, feedback_ids: Sequence[str], where: str) -> None:
        """These have been learned from, and `where` it went: a version, say.

        Ids that are not here yet are kept, for when the log is read again.
        """
        with self._transaction():
            self._db.executemany(
                "INSERT INTO votes VALUES (?1, '', 0, '', NULL, 0, 'learned', ?2)"
                " ON CONFLICT DO UPDATE SET state = 'learned', reason = ?2",
                [(id, where) for id in feedback_ids],
            )
            self._join(self._responses_of(feedback_ids))

    def give_back(self, feedback_ids: Sequence[str]) -> None:
        """What was learned from these is gone: weights that nobody saw were thrown away. They may be learned again."""
        with self._transaction():
            self._db.executemany(
                "UPDATE votes SET state = 'waiting' WHERE feedback_id = ?", [(id,) for id in feedback_ids]
            )
            self._join(self._responses_of(feedback_ids))

    def set_aside(self, feedback_id: str, reason: str) -> None:
        """The answer of this vote must not be learned from, for a reason that shows only when one tries."""
        with self._transaction():
            self._db.execute(
                "UPDATE answers SET problem = ? WHERE (response_id, choice_index) ="
                " (SELECT response_id, choice_index FROM votes WHERE feedback_id = ?)",
                (reason, feedback_id),
            )
            self._join(self._responses_of([feedback_id]))

    def _responses_of(self, feedback_ids: Sequence[str]) -> set[str]:
        found = (
            self._db.execute("SELECT response_id FROM votes WHERE feedback_id = ?", (id,)).fetchone()
            for id in feedback_ids
        )
        return {row[0] for row in found if row is not None}

    def ready(self, up: bool, before: float, limit: int) -> list[Example]:
        """Votes of one class that may be learned from and were cast before a time, oldest first."""
        rows = self._db.execute(
            "SELECT feedback_id, prompt, completion, up FROM votes JOIN answers USING (response_id, choice_index)"
            " WHERE state = 'ready' AND up = ? AND time <= ? ORDER BY time, feedback_id LIMIT ?",
            (up, before, limit),
        )
        return [
            Example(id, json.loads(prompt), json.loads(completion), bool(up)) for id, prompt, completion, up in rows
        ]

    def count_ready(self, before: float) -> tuple[int, int]:
        """Ups and downs that `ready` would give."""
        rows = self._db.execute(
            "SELECT up, count(*) FROM votes WHERE state = 'ready' AND time <= ? GROUP BY up", (before,)
        ).fetchall()
        counts = {bool(up): int(n) for up, n in rows}
        return counts.get(True, 0), counts.get(False, 0)

    def counts(self) -> dict[str, int]:
        """How many votes stand in each state."""
        return {state: int(n) for state, n in self._db.execute("SELECT state, count(*) FROM votes GROUP BY state")}

    def reason(self, feedback_id: str) -> tuple[str, str | None] | None:
        """State and reason of one vote; None where it has not been read."""
        row = self._db.execute("SELECT state, reason FROM votes WHERE feedback_id = ?", (feedback_id,)).fetchone()
        return (row[0], row[1]) if row else None

    def held_out_prompts(self) -> list[list[int]]:
        """The distinct prompts that were set aside for measuring, oldest first."""
        rows = self._db.execute(
            "SELECT prompt FROM answers WHERE problem = ? GROUP BY prompt ORDER BY min(rowid)", (HELD_OUT,)
        )
        return [json.loads(prompt) for (prompt,) in rows]

    def close(self) -> None:
        self._db.close()
