"""What the learner learns from: a thumb on an answer, or a pair of answers of which one was better."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, cast

Kind = Literal["correction", "preferred", "votes"]
"""Where a pair comes from: an edited answer over its original, an answer preferred over its sibling, an up and a down
on one prompt."""


@dataclass(frozen=True, slots=True)
class Thumb:
    """A vote that is ready, with the answer that it is about.

    `behaviour` are the log-probs, in nats, of the completion's tokens as they were sampled by `version`; both are empty
    for answers that were taken in before they were kept. `ended` says whether the answer ended by itself. `topic` is
    empty where nobody named one. `trust` weighs the vote, 0 to 1.
    """

    feedback_id: str
    prompt: list[int]
    completion: list[int]
    up: bool
    behaviour: list[float]
    version: str = "base"
    user: str = ""
    topic: str = ""
    ended: bool = True
    trust: float = 1.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, with the votes that say which is better: they are spent with it."""

    feedback_ids: tuple[str, ...]
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    kind: Kind
    trust: float = 1.0


Examples = Sequence[Thumb] | Sequence[Pair]


def spent(examples: Examples) -> list[str]:
    """The ids of the votes that are used up with these, in order."""
    return [
        id
        for example in examples
        for id in (example.feedback_ids if isinstance(example, Pair) else (example.feedback_id,))
    ]


def without(examples: Examples, left_out: Collection[int]) -> Examples:
    """All but those at these places."""
    return cast(Examples, [example for i, example in enumerate(examples) if i not in left_out])
