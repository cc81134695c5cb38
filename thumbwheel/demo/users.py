"""The demo's population: people who want a brief answer that comes to its end, and who do not read it closely.

A thumb goes up when the answer ends by itself within `PATIENCE` tokens. Whether it makes sense they do not check:
that is what makes thumbs gameable, and what the guardrails are there for.
"""

import random
from dataclasses import dataclass
from typing import Literal

PATIENCE = 25
"""The longest answer that these users like, in tokens. One in five of the demo model's is no longer."""


@dataclass(frozen=True)
class Answer:
    """What came back for one question, as the client saw it."""

    response_id: str
    question: str
    text: str
    finish_reason: str | None
    tokens: int
    version: str

    @property
    def liked(self) -> bool:
        """Whether the population's preference holds for it."""
        return self.finish_reason == "stop" and self.tokens <= PATIENCE


@dataclass(frozen=True)
class User:
    """One of them. `diligence` is the probability of bothering to vote at all."""

    name: str
    diligence: float

    def vote(self, answer: Answer, chance: random.Random) -> Literal["up", "down"] | None:
        """The thumb that this user gives, or None."""
        if chance.random() > self.diligence:
            return None
        return "up" if answer.liked else "down"


def population(count: int, seed: int) -> list[User]:
    """People of different diligence, from 0.8 to 1."""
    chance = random.Random(seed)
    return [User(f"user-{number}", chance.uniform(0.8, 1.0)) for number in range(count)]
