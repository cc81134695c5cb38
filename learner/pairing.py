"""Which votes make pairs, kept in the buffer's file with every change of a vote.

A vote *stands* where it is ready or learned and its answer may be learned from. Each that stands has one source of a
pair: its correction, else the sibling that it prefers, else a vote the other way on another answer to its prompt. What
pairs of ready votes there are follows from those votes alone, in whatever order they came.
"""

import sqlite3
from collections.abc import Collection, Iterable
from itertools import islice

import orjson

from learner.database import VARIABLES, among, transaction
from learner.examples import Kind, Pair
from learner.join import Ballot, match

_SOURCE = """
    UPDATE votes SET (source, prompt_key, completion_key) = (
        SELECT CASE
            WHEN key(votes.correction) != answers.text_key
                AND json_array_length(corrected) <= 4 * max(length(behaviour) / 4, 256) THEN 'correction'
            WHEN EXISTS (
                SELECT 1 FROM answers AS sibling
                WHERE sibling.response_id = preferred_over AND sibling.choice_index = 0 AND sibling.problem IS NULL
                AND sibling.prompt_key = answers.prompt_key AND sibling.completion_key != answers.completion_key
            ) THEN 'preferred'
            ELSE 'votes' END,
            answers.prompt_key, answers.completion_key
        FROM answers WHERE answers.response_id = votes.response_id AND answers.choice_index = votes.choice_index
        AND problem IS NULL AND up IS NOT NULL AND state IN ('ready', 'learned')
    ) WHERE response_id IN ({})"""
"""Where a vote's pair would come from, and NULL for one that does not stand. A correction without tokens, and an answer
that is more than text or of which no text is known, have a NULL in its condition. It may have four times the tokens of
the answer, or of 256."""

_PAIR = """
    SELECT answers.prompt, answers.completion, votes.corrected, sibling.completion
    FROM votes JOIN answers USING (response_id, choice_index)
    LEFT JOIN votes AS down ON down.feedback_id = ?2
    LEFT JOIN answers AS sibling ON sibling.response_id = ifnull(down.response_id, votes.preferred_over)
        AND sibling.choice_index = ifnull(down.choice_index, 0)
    WHERE votes.feedback_id = ?1"""

WINDOW = 32
"""Of the votes on one prompt that may be matched, the oldest so many of each rating are, so that however many lie on a
prompt, one more costs the same."""

LOOK_BACK = 100_000
"""The newest so many votes are looked through for the newest pairs."""


class Pairing:
    """The pairs in a buffer's file."""

    def __init__(self, db: sqlite3.Connection) -> None:
        """Votes that were there before pairs were are matched now."""
        self._db = db
        while rows := db.execute(f"SELECT prompt_key FROM unmatched LIMIT {VARIABLES}").fetchall():
            with transaction(db):
                self._match([prompt for (prompt,) in rows])
                db.executemany("DELETE FROM unmatched WHERE prompt_key = ?", rows)

    def update(self, voted: Collection[str]) -> None:
        """Work out again what pairs the votes on these responses are in."""
        prompts = "SELECT prompt_key FROM votes WHERE response_id IN ({}) AND source IS NOT NULL"
        touched = set(among(self._db, prompts, voted))
        among(self._db, _SOURCE, voted)
        touched.update(among(self._db, prompts, voted))
        among(
            self._db,
            "DELETE FROM pairs WHERE kind != 'votes' AND feedback_id IN"
            " (SELECT feedback_id FROM votes WHERE response_id IN ({}))",
            voted,
        )
        self._match({prompt for (prompt,) in touched})
        among(
            self._db,
            "INSERT INTO pairs SELECT feedback_id, NULL, source, prompt_key, time FROM votes"
            " INDEXED BY votes_by_response WHERE response_id IN ({}) AND state = 'ready'"
            " AND source IN ('correction', 'preferred')",
            voted,
        )

    def _match(self, prompts: Collection[bytes]) -> None:
        """Work out again which ready votes on these prompts make pairs with one another."""
        rows = among(
            self._db, "SELECT feedback_id, other FROM pairs WHERE kind = 'votes' AND prompt_key IN ({})", prompts
        )
        there = set(rows)
        pairs = {(up.feedback_id, down.feedback_id): (up, down) for key in prompts for up, down in self._matched(key)}
        self._db.executemany("DELETE FROM pairs WHERE feedback_id = ? AND other = ?", there - pairs.keys())
        self._db.executemany(
            "INSERT INTO pairs VALUES (?, ?, 'votes', ?, ?)",
            [(*ids, up.prompt, max(up.time, down.time)) for ids, (up, down) in pairs.items() if ids not in there],
        )

    def _matched(self, prompt: bytes) -> list[tuple[Ballot, Ballot]]:
        """The oldest votes on a prompt, an up with a down on another answer."""
        window = self._window(prompt, True)
        window += self._window(prompt, False) if window else []
        pairs = _in_time(window)
        rest = set(window).difference(*pairs)
        if len({ballot.up for ballot in rest}) < 2 or len(window) < WINDOW:
            return pairs
        # What is left is on one answer, and there may be others behind.
        (answer,) = {ballot.answer for ballot in rest}
        others = "AND completion_key {} ? ORDER BY completion_key,"
        behind = [
            ballot
            for up in (True, False)
            for side in ("<", ">")
            for ballot in self._window(prompt, up, others.format(side), (answer,))
        ]
        return _in_time({*window, *behind})

    def _window(
        self, prompt: bytes, up: bool, order: str = "ORDER BY", parameters: tuple[bytes, ...] = ()
    ) -> list[Ballot]:
        rows = self._db.execute(
            "SELECT feedback_id, time, completion_key FROM votes WHERE state = 'ready' AND source = 'votes'"
            f" AND prompt_key = ? AND up = ? {order} time, feedback_id LIMIT {WINDOW}",
            (prompt, up, *parameters),
        )
        return [Ballot(id, up, time, prompt, answer) for id, time, answer in rows]

    def ready(self, before: float, limit: int) -> list[Pair]:
        """Pairs of votes that are ready and were cast before a time, oldest first by their later vote."""
        rows = self._db.execute(
            "SELECT kind, feedback_id, other FROM pairs WHERE time <= ? ORDER BY time, feedback_id LIMIT ?",
            (before, limit),
        ).fetchall()
        return [self._read(*row) for row in rows]

    def count(self, before: float) -> int:
        """How many `ready` would give."""
        query = "SELECT n - (SELECT count(*) FROM pairs WHERE time > ?) FROM pair_tally"
        (count,) = self._db.execute(query, (before,)).fetchone()
        return int(count)

    def newest(self, before: float, limit: int) -> list[Pair]:
        """Pairs of votes that stand, learned or not, and were cast before a time, newest first by their earlier vote.

        An up and a down are matched newest with newest, so that these need not be the pairs that were learned.
        """
        rows = self._db.execute(
            "SELECT source, feedback_id, up, time, prompt_key, completion_key FROM votes WHERE source IS NOT NULL"
            " AND time <= ? ORDER BY time DESC, feedback_id DESC LIMIT ?",
            (before, LOOK_BACK),
        ).fetchall()
        ballots = (Ballot(id, bool(up), *rest) for source, id, up, *rest in rows if source == "votes")
        matched = ((min(up.time, down.time), "votes", up.feedback_id, down.feedback_id) for up, down in match(ballots))
        alone = [(row[3], row[0], row[1], None) for row in rows if row[0] != "votes"][:limit]
        found = sorted([*alone, *islice(matched, limit)], key=lambda pair: (-pair[0], pair[2]))
        return [self._read(kind, id, other) for _, kind, id, other in found[:limit]]

    def _read(self, kind: Kind, feedback_id: str, other: str | None) -> Pair:
        prompt, answer, corrected, sibling = (
            text and orjson.loads(text) for text in self._db.execute(_PAIR, (feedback_id, other)).fetchone()
        )
        ids = (feedback_id,) if other is None else (feedback_id, other)
        if kind == "correction":
            return Pair(ids, prompt, corrected, answer, kind)
        return Pair(ids, prompt, answer, sibling, kind)


def _in_time(ballots: Iterable[Ballot]) -> list[tuple[Ballot, Ballot]]:
    return list(match(sorted(ballots, key=lambda ballot: (ballot.time, ballot.feedback_id))))
