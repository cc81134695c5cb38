"""The learner's own SQLite file: what it has read off the log, and what became of each vote.

Events, the standing of the votes that they touch and the offset that they came from land in one transaction: killed at
any moment, it goes on where it was, and a record that is read twice changes nothing. Offsets are kept for each log: on
another one everything is read again, and ids say what is known. What has been *learned* is decided by the checkpoint;
`learned` here repeats it, before anything else is read.
"""

import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import orjson

from learner.admission import HELD_OUT, Answer, admit
from learner.join import State, Vote, join
from thumbwheel.errors import LogError, ThumbwheelError
from thumbwheel.events import FeedbackSubmitted, ResponseGenerated
from thumbwheel.log import Record
from thumbwheel.migrations import migrate
from thumbwheel.reader import event_of

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
    """
    DROP TABLE unreadable;
    DROP TABLE offsets;
    CREATE TABLE offsets (
        log TEXT NOT NULL,
        topic TEXT NOT NULL,
        partition INTEGER NOT NULL,
        "offset" INTEGER NOT NULL,
        PRIMARY KEY (log, topic, partition)
    ) WITHOUT ROWID;
    UPDATE answers SET prompt = replace(prompt, ', ', ','), completion = replace(completion, ', ', ',');
    CREATE TABLE held_out (number INTEGER PRIMARY KEY, prompt TEXT NOT NULL UNIQUE);
    INSERT INTO held_out (prompt)
        SELECT prompt FROM answers WHERE problem = 'its prompt is held out to measure KL'
        GROUP BY prompt ORDER BY min(rowid);
    DROP INDEX answers_by_problem;
    DROP INDEX votes_by_state;
    CREATE INDEX votes_by_state ON votes (state, up, time, feedback_id);
    """,
)

_TALLY = (
    "CREATE TEMP TABLE tally (state TEXT, up INTEGER, n INTEGER, PRIMARY KEY (state, up)) WITHOUT ROWID",
    *(f"INSERT INTO tally VALUES ('{state}', {up}, 0)" for state in get_args(State) for up in (-1, 0, 1)),
    "UPDATE tally SET n = found.n FROM (SELECT state, ifnull(up, -1) AS up, count(*) AS n FROM votes GROUP BY 1, 2)"
    " AS found WHERE tally.state = found.state AND tally.up = found.up",
    "CREATE TEMP TRIGGER vote_came AFTER INSERT ON votes BEGIN"
    " UPDATE tally SET n = n + 1 WHERE state = new.state AND up = ifnull(new.up, -1); END",
    "CREATE TEMP TRIGGER vote_changed AFTER UPDATE OF state, up ON votes BEGIN"
    " UPDATE tally SET n = n - 1 WHERE state = old.state AND up = ifnull(old.up, -1);"
    " UPDATE tally SET n = n + 1 WHERE state = new.state AND up = ifnull(new.up, -1); END",
)
"""Votes by state and rating, counted once when the file is opened and kept from then on; -1 is a retraction."""

_VARIABLES = 500
"""Values in one `IN (…)`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a record says: a vote, or a response with its answers."""

    event: FeedbackSubmitted | ResponseGenerated
    answers: Sequence[Answer] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A vote that is ready, with the answer that it is about."""

    feedback_id: str
    prompt: list[int]
    completion: list[int]
    up: bool


class Buffer:
    """One process writes it at a time."""

    def __init__(self, path: Path, vocabulary: int, held_out: Callable[[list[int]], bool], log: str) -> None:
        """Open or make the file. `held_out` says which prompts are kept for measuring, `log` is the log's identity.

        Raises ThumbwheelError.
        """
        self._path = path
        self._vocabulary = vocabulary
        self._held_out = held_out
        self._log = log
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA temp_store=MEMORY")
            migrate(self._db, MIGRATIONS)
            for statement in _TALLY:
                self._db.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise ThumbwheelError(f"cannot open the learner's buffer {path}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _among(self, query: str, ids: Iterable[str]) -> list[Any]:
        """All rows of a query with `IN ({})` in it."""
        some, rows = sorted(ids), []
        for start in range(0, len(some), _VARIABLES):
            part = some[start : start + _VARIABLES]
            rows += self._db.execute(query.format(",".join("?" * len(part))), part).fetchall()
        return rows

    @property
    def blank(self) -> bool:
        """Whether nothing has been read into it, from any log."""
        (some,) = self._db.execute(
            "SELECT EXISTS (SELECT 1 FROM responses) OR EXISTS (SELECT 1 FROM votes WHERE response_id > '')"
        ).fetchone()
        return not some

    def offsets(self) -> dict[tuple[str, int], int]:
        """Where reading of this log goes on, by topic and partition."""
        rows = self._db.execute('SELECT topic, partition, "offset" FROM offsets WHERE log = ?', (self._log,))
        return {(topic, partition): offset for topic, partition, offset in rows}

    def entry(self, record: Record) -> Entry:
        """Read a record; nothing is stored yet. Raises ValueError, or what its content provokes, where it cannot be."""
        event = event_of(record)
        if isinstance(event, ResponseGenerated):
            answers = admit(event, self._vocabulary, self._held_out)
            for answer in answers:
                _check_index(answer.choice_index)
            return Entry(event, answers)
        if isinstance(event, FeedbackSubmitted):
            _check_index(event.choice_index)
            if not math.isfinite(event.time):
                raise ValueError(f"the vote {event.id} was cast at {event.time}, which is no time")
            return Entry(event)
        raise ValueError(f"{event.type} is nothing to learn from")

    def consume(self, entries: Sequence[Entry], last: Record) -> None:
        """Take in what records of one partition say, in order, and that they were read up to `last`, all or nothing.

        What was there stays. Raises LogError where the file cannot be written now; then try again.
        """
        try:
            with self._transaction():
                self._store([entry for entry in entries if isinstance(entry.event, ResponseGenerated)])
                self._cast([entry.event for entry in entries if isinstance(entry.event, FeedbackSubmitted)])
                self._db.execute(
                    'INSERT INTO offsets VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET "offset" = excluded."offset"',
                    (self._log, last.topic, last.partition, last.offset + 1),
                )
                self._join({entry.event.response_id for entry in entries})
        except sqlite3.OperationalError as error:
            raise LogError(f"cannot write the learner's buffer {self._path}: {error}") from error

    def _store(self, responses: Sequence[Entry]) -> None:
        """Token ids are kept where they can be used: of what may be learned from, and prompts to measure on."""
        self._db.executemany(
            "INSERT OR IGNORE INTO responses VALUES (?)", [(entry.event.response_id,) for entry in responses]
        )
        answers = [(entry.event.response_id, answer) for entry in responses for answer in entry.answers]
        self._db.executemany(
            "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)",
            [
                (id, a.choice_index, _text(a.prompt), _text(a.completion), None)
                if a.problem is None
                else (id, a.choice_index, "[]", "[]", a.problem)
                for id, a in answers
            ],
        )
        self._db.executemany(
            "INSERT OR IGNORE INTO held_out (prompt) VALUES (?)",
            [(_text(answer.prompt),) for _, answer in answers if answer.problem == HELD_OUT],
        )

    def _cast(self, votes: Sequence[FeedbackSubmitted]) -> None:
        self._db.executemany(
            "INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, 'waiting', NULL) ON CONFLICT DO UPDATE SET"
            " response_id = excluded.response_id, choice_index = excluded.choice_index, user = excluded.user,"
            " up = excluded.up, time = excluded.time WHERE response_id = ''",
            [
                (
                    vote.id,
                    vote.response_id,
                    vote.choice_index,
                    vote.user,
                    None if vote.retracted or vote.rating is None else vote.rating == "up",
                    vote.time,
                )
                for vote in votes
            ],
        )

    def _join(self, touched: Iterable[str]) -> None:
        """Work out again how the votes on these responses stand."""
        rows = self._among(
            "SELECT feedback_id, response_id, choice_index, user, up, time, state, reason FROM votes"
            " WHERE response_id IN ({})",
            touched,
        )
        voted = {row[1] for row in rows}
        arrived = self._among("SELECT response_id FROM responses WHERE response_id IN ({})", voted)
        answers = self._among("SELECT response_id, choice_index, problem FROM answers WHERE response_id IN ({})", voted)
        standings = join(
            [
                Vote(id, response_id, index, user, None if up is None else bool(up), time, state == "learned")
                for id, response_id, index, user, up, time, state, _ in rows
            ],
            {(response_id, index): problem for response_id, index, problem in answers},
            {response_id for (response_id,) in arrived},
        )
        before = {row[0]: row[6:] for row in rows}
        self._db.executemany(
            "UPDATE votes SET state = ?, reason = ? WHERE feedback_id = ? AND state != 'learned'",
            [
                (standing.state, standing.reason, id)
                for id, standing in standings.items()
                if before[id] != (standing.state, standing.reason)
            ],
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
                "UPDATE votes SET state = 'waiting', reason = NULL WHERE feedback_id = ?",
                [(id,) for id in feedback_ids],
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
        """What these votes are about, of those that have been read."""
        rows = self._among("SELECT response_id FROM votes WHERE feedback_id IN ({}) AND response_id > ''", feedback_ids)
        return {response_id for (response_id,) in rows}

    def ready(self, up: bool, before: float, limit: int) -> list[Example]:
        """Votes of one class that may be learned from and were cast before a time, oldest first."""
        rows = self._db.execute(
            "SELECT feedback_id, prompt, completion, up FROM votes JOIN answers USING (response_id, choice_index)"
            " WHERE state = 'ready' AND up = ? AND time <= ? ORDER BY time, feedback_id LIMIT ?",
            (up, before, limit),
        )
        return [
            Example(id, orjson.loads(prompt), orjson.loads(completion), bool(up)) for id, prompt, completion, up in rows
        ]

    def count_ready(self, before: float) -> tuple[int, int]:
        """Ups and downs that `ready` would give."""
        counts = dict(
            self._db.execute(
                "SELECT up, n - (SELECT count(*) FROM votes WHERE state = 'ready' AND votes.up = tally.up AND time > ?)"
                " FROM tally WHERE state = 'ready'",
                (before,),
            )
        )
        return int(counts[1]), int(counts[0])

    def counts(self) -> dict[str, int]:
        """How many votes stand in each state."""
        return dict(self._db.execute("SELECT state, sum(n) FROM tally GROUP BY state"))

    def reason(self, feedback_id: str) -> tuple[str, str | None] | None:
        """State and reason of one vote; None where it has not been read."""
        row = self._db.execute("SELECT state, reason FROM votes WHERE feedback_id = ?", (feedback_id,)).fetchone()
        return (row[0], row[1]) if row else None

    def held_out_prompts(self, limit: int) -> list[list[int]]:
        """The distinct prompts that were set aside for measuring, oldest first."""
        rows = self._db.execute("SELECT prompt FROM held_out ORDER BY number LIMIT ?", (limit,))
        return [orjson.loads(prompt) for (prompt,) in rows]

    def count_held_out(self) -> int:
        """How many distinct prompts were set aside for measuring."""
        (last,) = self._db.execute("SELECT max(number) FROM held_out").fetchone()  # none is ever deleted
        return last or 0

    def close(self) -> None:
        self._db.close()


def _text(ids: list[int]) -> str:
    return orjson.dumps(ids).decode()


def _check_index(index: int) -> None:
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"the choice {index} is out of range")
