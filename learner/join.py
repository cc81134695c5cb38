"""Votes meet responses. Pure: what comes out depends on what is there, not on the order in which it came.

Rules: the last vote of a user on an answer (a response's choice) wins, by its time and then its id; a retraction takes
it back; several users on one answer each have a vote; a vote that was learned from stands, whatever its user says
later.

Two votes that stand may say together which of two answers is better: `match`.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

State = Literal["waiting", "ready", "learned", "set_aside"]
"""Of a vote: its response is not there yet; it may be learned from; it was; it never will be (the reason says why)."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One feedback event. `up` is None for a retraction."""

    feedback_id: str
    response_id: str
    choice_index: int
    user: str
    up: bool | None
    time: float
    learned: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """What became of a vote."""

    feedback_id: str
    state: State
    reason: str | None = None


def join(
    votes: Iterable[Vote], answers: Mapping[tuple[str, int], str | None], responses: Collection[str]
) -> dict[str, Standing]:
    """The standing of each vote by its id.

    `answers`, by response id and choice index, says why one must not be learned from (None: it may). `responses` are
    the ids that have arrived, so that a vote on a choice that its response does not have is told from an early one.
    """

    def voter(vote: Vote) -> tuple[str, int, str]:
        return (vote.response_id, vote.choice_index, vote.user)

    standings: dict[str, Standing] = {}
    unique = {vote.feedback_id: vote for vote in votes}.values()
    for (response_id, choice_index, _), group in groupby(sorted(unique, key=voter), key=voter):
        cast = sorted(group, key=lambda vote: (vote.time, vote.feedback_id))
        arrived = response_id in responses
        problem = answers.get((response_id, choice_index), f"the response has no choice {choice_index}")
        learned = any(vote.learned for vote in cast)
        for vote in cast:
            last = vote is cast[-1]
            standings[vote.feedback_id] = _stand(vote, last, learned, arrived, problem)
    return standings


def _stand(vote: Vote, last: bool, learned: bool, arrived: bool, problem: str | None) -> Standing:
    def because(reason: str) -> Standing:
        return Standing(vote.feedback_id, "set_aside", reason)

    if vote.learned:
        return Standing(vote.feedback_id, "learned")
    if learned:
        return because("came after an earlier vote of its user on this answer had been learned from")
    if not last:
        return because("a later vote of its user on this answer took its place")
    if vote.up is None:
        return because("a retraction")
    if not arrived:
        return Standing(vote.feedback_id, "waiting")
    if problem is not None:
        return because(problem)
    return Standing(vote.feedback_id, "ready")


@dataclass(frozen=True, slots=True)
class Ballot:
    """A vote that stands, with keys of its prompt and of its answer: the same tokens, the same key."""

    feedback_id: str
    up: bool
    time: float
    prompt: bytes
    answer: bytes


def match(ballots: Iterable[Ballot]) -> Iterator[tuple[Ballot, Ballot]]:
    """Ups with downs on other answers to the same prompt, (up, down), each ballot once.

    In the order given, each is matched with the first that waits for one like it, or waits: in the order of time the
    oldest with the oldest, and what comes later changes nothing before it.
    """
    waiting: defaultdict[tuple[bytes, bool], list[Ballot]] = defaultdict(list)
    alike: Counter[tuple[bytes, bool, bytes]] = Counter()  # of those that wait, how many are on one answer
    for ballot in ballots:
        others = waiting[ballot.prompt, not ballot.up]
        if len(others) == alike[ballot.prompt, not ballot.up, ballot.answer]:
            waiting[ballot.prompt, ballot.up].append(ballot)
            alike[ballot.prompt, ballot.up, ballot.answer] += 1
            continue
        other = next(other for other in others if other.answer != ballot.answer)
        others.remove(other)
        alike[other.prompt, other.up, other.answer] -= 1
        yield (ballot, other) if ballot.up else (other, ballot)
