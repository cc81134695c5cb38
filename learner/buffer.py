"""The learner's own SQLite file: what it has read off the log, and what became of each vote.

Events, the standing of the votes that they touch and the offset that they came from land in one transaction: killed at
any moment, it goes on where it was, and a record that is read twice changes nothing. Offsets are kept for each log: on
another one everything is read again, and ids say what is known. What has been *learned* is decided by the checkpoint;
`learned` here repeats it, before anything else is read.
"""

import math
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from learner.admission import HELD_OUT, Answer, admit
from learner.database import among, connect, key, transaction
from learner.examples import Pair, Thumb
from learner.join import Vote, join
from learner.pairing import Pairing
from learner.tokens import Tokens
from thumbwheel.errors import LogError
from thumbwheel.events import FeedbackSubmitted, ResponseGenerated
from thumbwheel.log import Record
from thumbwheel.reader import event_of

_THUMB = """
    SELECT feedback_id, prompt, completion, up, behaviour, version, user,
        ifnull(nullif(votes.topic, ''), answers.topic), ended
    FROM votes JOIN answers USING (response_id, choice_index)"""

TOPIC = 200
"""Characters of a topic that are kept."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a record says: a vote with the tokens of its correction, or a response with its answers."""

    event: FeedbackSubmitted | ResponseGenerated
    answers: Sequence[Answer] = ()
    corrected: Sequence[int] = ()


class Buffer:
    """One process writes it at a time."""

    def __init__(
        self,
        path: Path,
        vocabulary: int,
        held_out: Callable[[list[int]], bool],
        log: str,
        tokens: Tokens | None = None,
    ) -> None:
        """Open or make the file. `held_out` says which prompts are kept for measuring, `log` is the log's identity.

        Without `tokens`, recorded texts are not compared with what their tokens say, and corrections make no pairs.
        Raises ThumbwheelError.
        """
        self._path = path
        self._vocabulary = vocabulary
        self._held_out = held_out
        self._log = log
        self._tokens = tokens
        self._db = connect(path)
        self._pairing = Pairing(self._db)

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
            decode = self._tokens.decode if self._tokens is not None else None
            answers = admit(event, self._vocabulary, self._held_out, decode)
            for answer in answers:
                _check_index(answer.choice_index)
            return Entry(event, answers)
        if isinstance(event, FeedbackSubmitted):
            _check_index(event.choice_index)
            if not math.isfinite(event.time):
                raise ValueError(f"the vote {event.id} was cast at {event.time}, which is no time")
            return Entry(event, corrected=self._correct(event))
        raise ValueError(f"{event.type} is nothing to learn from")

    def _correct(self, vote: FeedbackSubmitted) -> list[int]:
        """The tokens of a vote's correction; empty where it has none that can be learned from."""
        text = (vote.correction or "").strip()
        ids = self._tokens.encode_turn(text) if text and self._tokens is not None else []
        return ids if all(0 <= id < self._vocabulary for id in ids) else []

    def consume(self, entries: Sequence[Entry], last: Record) -> None:
        """Take in what records of one partition say, in order, and that they were read up to `last`, all or nothing.

        What was there stays. Raises LogError where the file cannot be written now; then try again.
        """
        try:
            with transaction(self._db):
                self._store([(e.event, e.answers) for e in entries if isinstance(e.event, ResponseGenerated)])
                self._cast([(e.event, e.corrected) for e in entries if isinstance(e.event, FeedbackSubmitted)])
                self._db.execute(
                    'INSERT INTO offsets VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET "offset" = excluded."offset"',
                    (self._log, last.topic, last.partition, last.offset + 1),
                )
                arrived = {entry.event.response_id for entry in entries if entry.answers}
                self._join({entry.event.response_id for entry in entries} | self._that_prefer_to(arrived))
        except sqlite3.OperationalError as error:
            raise LogError(f"cannot write the learner's buffer {self._path}: {error}") from error

    def _store(self, responses: Sequence[tuple[ResponseGenerated, Sequence[Answer]]]) -> None:
        """Token ids are kept where they can be used: of what may be learned from, and prompts to measure on."""
        self._db.executemany(
            "INSERT OR IGNORE INTO responses VALUES (?)", [(response.response_id,) for response, _ in responses]
        )
        self._db.executemany(
            "INSERT OR IGNORE INTO answers (response_id, choice_index, prompt, completion, problem, behaviour, version,"
            " ended, topic, prompt_key, completion_key, text_key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [_row(response, answer) for response, answers in responses for answer in answers],
        )
        self._db.executemany(
            "INSERT OR IGNORE INTO held_out (prompt) VALUES (?)",
            [(_text(a.prompt),) for _, answers in responses for a in answers if a.problem == HELD_OUT],
        )

    def _cast(self, votes: Sequence[tuple[FeedbackSubmitted, Sequence[int]]]) -> None:
        self._db.executemany(
            "INSERT INTO votes (feedback_id, response_id, choice_index, user, up, time, state, topic, correction,"
            " corrected, preferred_over) VALUES (?, ?, ?, ?, ?, ?, 'waiting', ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " response_id = excluded.response_id, choice_index = excluded.choice_index, user = excluded.user,"
            " up = excluded.up, time = excluded.time, topic = excluded.topic, correction = excluded.correction,"
            " corrected = excluded.corrected, preferred_over = excluded.preferred_over WHERE response_id = ''",
            [
                (
                    vote.id,
                    vote.response_id,
                    vote.choice_index,
                    vote.user,
                    None if vote.retracted or vote.rating is None else vote.rating == "up",
                    vote.time,
                    _topic(vote.metadata),
                    vote.correction,
                    _text(corrected) if corrected else None,
                    vote.preferred_over,
                )
                for vote, corrected in votes
            ],
        )

    def _join(self, touched: Iterable[str]) -> None:
        """Work out again how the votes on these responses stand."""
        rows = among(
            self._db,
            "SELECT feedback_id, response_id, choice_index, user, up, time, state, reason FROM votes"
            " WHERE response_id IN ({})",
            touched,
        )
        voted = {row[1] for row in rows}
        arrived = among(self._db, "SELECT response_id FROM responses WHERE response_id IN ({})", voted)
        answers = among(
            self._db, "SELECT response_id, choice_index, problem FROM answers WHERE response_id IN ({})", voted
        )
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
        self._pairing.update(voted)

    def learned(self, feedback_ids: Sequence[str], where: str) -> None:
        """These have been learned from, and `where` it went: a version, say.

        Ids that are not here yet are kept, for when the log is read again.
        """
        with transaction(self._db):
            self._db.executemany(
                "INSERT INTO votes (feedback_id, response_id, choice_index, user, up, time, state, reason)"
                " VALUES (?1, '', 0, '', NULL, 0, 'learned', ?2)"
                " ON CONFLICT DO UPDATE SET state = 'learned', reason = ?2",
                [(id, where) for id in feedback_ids],
            )
            self._join(self._responses_of(feedback_ids))

    def give_back(self, feedback_ids: Sequence[str]) -> None:
        """What was learned from these is gone: weights that nobody saw were thrown away. They may be learned again."""
        with transaction(self._db):
            self._db.executemany(
                "UPDATE votes SET state = 'waiting', reason = NULL WHERE feedback_id = ?",
                [(id,) for id in feedback_ids],
            )
            self._join(self._responses_of(feedback_ids))

    def set_aside(self, feedback_id: str, reason: str) -> None:
        """The answer of this vote must not be learned from, for a reason that shows only when one tries."""
        with transaction(self._db):
            self._db.execute(
                "UPDATE answers SET problem = ? WHERE (response_id, choice_index) ="
                " (SELECT response_id, choice_index FROM votes WHERE feedback_id = ?)",
                (reason, feedback_id),
            )
            responses = self._responses_of([feedback_id])
            self._join(responses | self._that_prefer_to(responses))

    def _responses_of(self, feedback_ids: Sequence[str]) -> set[str]:
        """What these votes are about, of those that have been read."""
        rows = among(
            self._db, "SELECT response_id FROM votes WHERE feedback_id IN ({}) AND response_id > ''", feedback_ids
        )
        return {response_id for (response_id,) in rows}

    def _that_prefer_to(self, responses: Iterable[str]) -> set[str]:
        """Responses with a vote that prefers them to one of these."""
        rows = among(
            self._db, "SELECT response_id FROM votes WHERE preferred_over IN ({}) AND response_id > ''", responses
        )
        return {response_id for (response_id,) in rows}

    def ready(self, up: bool, before: float, limit: int) -> list[Thumb]:
        """Votes of one class that may be learned from and were cast before a time, oldest first."""
        rows = self._db.execute(
            f"{_THUMB} WHERE state = 'ready' AND up = ? AND time <= ? ORDER BY time, feedback_id LIMIT ?",
            (up, before, limit),
        )
        return [_thumb(row) for row in rows]

    def newest(self, before: float, limit: int) -> list[Thumb]:
        """The votes that stand, learned or not, and were cast before a time, newest first. Reading spends none."""
        rows = self._db.execute(
            f"{_THUMB} WHERE source IS NOT NULL AND time <= ? ORDER BY time DESC, feedback_id DESC LIMIT ?",
            (before, limit),
        )
        return [_thumb(row) for row in rows]

    def pairs(self, before: float, limit: int) -> list[Pair]:
        """Pairs of votes that are ready and were cast before a time, oldest first by their later vote."""
        return self._pairing.ready(before, limit)

    def count_pairs(self, before: float) -> int:
        """How many `pairs` would give."""
        return self._pairing.count(before)

    def newest_pairs(self, before: float, limit: int) -> list[Pair]:
        """Pairs of votes that stand, learned or not, and were cast before a time, newest first. Reading spends none."""
        return self._pairing.newest(before, limit)

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


def _row(response: ResponseGenerated, answer: Answer) -> tuple[Any, ...]:
    """Of the table of answers."""
    place = (response.response_id, answer.choice_index)
    if answer.problem is not None:
        return (*place, "[]", "[]", answer.problem, b"", response.version, answer.ended, "", None, None, None)
    prompt, completion = _text(answer.prompt), _text(answer.completion)
    behaviour = array("f", answer.behaviour).tobytes()
    topic = _topic(response.request.get("metadata"))
    about = (behaviour, response.version, answer.ended, topic)
    return (*place, prompt, completion, None, *about, key(prompt), key(completion), key(answer.text))


def _thumb(row: Sequence[Any]) -> Thumb:
    id, prompt, completion, up, behaviour, version, user, topic, ended = row
    logprobs = array("f", behaviour).tolist()
    return Thumb(
        id, orjson.loads(prompt), orjson.loads(completion), bool(up), logprobs, version, user, topic, bool(ended)
    )


def _topic(metadata: Any) -> str:
    topic = metadata.get("topic") if isinstance(metadata, dict) else None
    return topic[:TOPIC] if isinstance(topic, str) else ""


def _text(ids: Sequence[int]) -> str:
    return orjson.dumps(ids).decode()


def _check_index(index: int) -> None:
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"the choice {index} is out of range")
