"""What a recorded log holds to learn from, and which algorithm lacks what: `thumbwheel learn --from LOG --dry-run`.

It counts, and asks no model: whether logged answers are near enough to the policy for "ppo-logged", and whether the
votes teach a reward model anything, shows when one tries.
"""

import math
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from learner.algorithms import ALGORITHMS, find
from learner.database import connect
from learner.recording import Recording, open_recording
from thumbwheel.events import FEEDBACK, RESPONSES
from thumbwheel.settings import Settings

_READY = "FROM votes JOIN answers USING (response_id, choice_index) WHERE state = 'ready' AND time <= ?"
_ANSWERS = f"(SELECT DISTINCT response_id, choice_index, prompt, completion, answers.prompt_key, behaviour {_READY})"

REASON = 200
"""Characters of a reason that are kept."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of all, of half of them at most, of nine tenths, of 99 in 100, and of the longest."""

    total: int
    p50: int
    p90: int
    p99: int
    longest: int


@dataclass(frozen=True, slots=True)
class Survey:
    """Counts. `refused` are the answers that must not be learned from, by reason; `votes` are by state and reason.

    From `ups` on they are of the votes that are ready and have settled: who cast them, which versions sampled their
    answers, the pairs that they make by kind, the answers themselves (`learnable`, each once) and their prompts.
    Reasons that differ in numbers and quotations alone are one.
    """

    log: str
    algorithm: str
    batch: int
    records: dict[str, int]
    unreadable: dict[str, int]
    responses: int
    answers: int
    refused: dict[str, int]
    votes: dict[str, dict[str, int]]
    ups: int
    downs: int
    users: int
    versions: dict[str, int]
    pairs: dict[str, int]
    learnable: int
    with_logprobs: int
    prompts: int
    held_out_prompts: int
    prompt_tokens: Lengths
    answer_tokens: Lengths
    lacks: dict[str, list[str]]

    @property
    def ready(self) -> bool:
        """Whether the algorithm that is set could make an update."""
        return not self.lacks[self.algorithm]


def survey(settings: Settings, where: str) -> Survey:
    """Read a log (see `open_recording`) and count. Raises SettingsError for an algorithm that there is not."""
    find(settings.learner)
    with open_recording(settings, where) as recording:
        db = connect(recording.path)
        try:
            return _count(settings, where, recording, db)
        finally:
            db.close()


def _count(settings: Settings, where: str, recording: Recording, db: sqlite3.Connection) -> Survey:
    before, supply = (recording.before,), recording.supply

    def one(query: str, *parameters: float) -> int:
        return int(db.execute(query, parameters).fetchone()[0])

    lengths = db.execute(
        f"SELECT json_array_length(prompt), json_array_length(completion) FROM {_ANSWERS}", before
    ).fetchall()
    votes: dict[str, dict[str, int]] = {}
    for state, reason, n in db.execute("SELECT state, ifnull(reason, ''), count(*) FROM votes GROUP BY 1, 2"):
        _add(votes.setdefault(state, {}), kind(reason), n)
    refused: dict[str, int] = {}
    for reason, n in db.execute("SELECT problem, count(*) FROM answers WHERE problem IS NOT NULL GROUP BY 1"):
        _add(refused, kind(reason), n)
    return Survey(
        log=where,
        algorithm=settings.learner.algorithm,
        batch=settings.learner.batch,
        records={"responses": recording.records[RESPONSES], "feedback": recording.records[FEEDBACK]},
        unreadable=_falling(Counter(f"{record.topic}: {kind(record.why)}" for record in recording.unreadable)),
        responses=one("SELECT count(*) FROM responses"),
        answers=one("SELECT count(*) FROM answers"),
        refused=_falling(refused),
        votes={state: _falling(reasons) for state, reasons in sorted(votes.items())},
        ups=supply.ups,
        downs=supply.downs,
        users=one(f"SELECT count(DISTINCT user) {_READY}", *before),
        versions=dict(db.execute(f"SELECT version, count(*) {_READY} GROUP BY 1 ORDER BY 2 DESC, 1", before)),
        pairs=dict(db.execute("SELECT kind, count(*) FROM pairs WHERE time <= ? GROUP BY 1 ORDER BY 1", before)),
        learnable=len(lengths),
        with_logprobs=one(f"SELECT count(*) FROM {_ANSWERS} WHERE length(behaviour) > 0", *before),
        prompts=one(f"SELECT count(DISTINCT prompt_key) FROM {_ANSWERS}", *before),
        held_out_prompts=supply.held_out,
        prompt_tokens=_lengths([prompt for prompt, _ in lengths]),
        answer_tokens=_lengths([answer for _, answer in lengths]),
        lacks={name: recording.lacks(algorithm.needs) for name, algorithm in ALGORITHMS.items()},
    )


def kind(words: str) -> str:
    """Words without what differs from one to the next: numbers, quotations and what follows the first line."""
    first = words.split("\n", 1)[0]
    return re.sub(r"'[^']*'|\"[^\"]*\"|-?\d[\d.]*(e[+-]?\d+)?", "…", first)[:REASON]


def _lengths(tokens: Sequence[int]) -> Lengths:
    ordered = sorted(tokens) or [0]
    p50, p90, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.9, 0.99))
    return Lengths(sum(ordered), p50, p90, p99, ordered[-1])


def _add(counts: dict[str, int], name: str, n: int) -> None:
    counts[name] = counts.get(name, 0) + n


def _falling(counts: dict[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
