"""What an update goes over, and what an algorithm's function gets to see of it.

A `Plan` is made once an update: rows, and what is known of each before a weight moves. A `Batch` is some of its rows
with the policy's log-probs, differentiable. Losses add up: over the batches that a plan is cut into, they sum to the
loss of the whole, so that memory holds one of them at a time.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learner.logprobs import Row


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows with their log-probs. Tensors of tokens are rows × longest answer, padded on the right; nats.

    `size` and `tokens` are the rows and answer tokens of the whole that this is a part of: a loss is a sum over them.
    """

    policy: Tensor
    mask: Tensor
    facts: Mapping[str, Tensor]
    numbers: Mapping[str, float]
    size: int
    tokens: int
    values: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.facts[name]


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of an update, with `facts` about each (a tensor of rows, or of rows × longest answer).

    `numbers` hold for all of them. Rows of one unit stay side by side: a loss needs them together, or they share a
    prompt. `owners` says which example each row is for; `left_out` which examples are not learned from, and why.
    """

    rows: list[Row]
    owners: list[int]
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    units: Sequence[Sequence[int]] = ()
    left_out: Mapping[int, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many answer tokens there are."""
        return sum(len(row.completion) for row in self.rows)

    def select(self, indexes: Sequence[int]) -> "Plan":
        """Some of the rows as a whole of their own; units must be whole among them."""
        place = {row: position for position, row in enumerate(indexes)}
        rows = [self.rows[i] for i in indexes]
        longest = max(len(row.completion) for row in rows)
        return Plan(
            rows,
            [self.owners[i] for i in indexes],
            {name: _rows(fact, indexes, longest) for name, fact in self.facts.items()},
            self.numbers,
            [[place[i] for i in unit] for unit in self.units if unit[0] in place],
        )

    def batch(self, indexes: Sequence[int], policy: Tensor, values: Tensor | None = None) -> Batch:
        """Some of the rows, as an algorithm's function takes them, from the policy's log-probs of their tokens."""
        longest = policy.shape[1]
        facts = {name: _like(_rows(fact, indexes, longest), policy) for name, fact in self.facts.items()}
        mask = answer_mask([self.rows[i] for i in indexes]).to(policy.device)
        return Batch(policy, mask, facts, self.numbers, len(self.rows), self.tokens, values)


def answer_mask(rows: Sequence[Row]) -> Tensor:
    """True where an answer has a token, rows × longest answer."""
    lengths = torch.tensor([len(row.completion) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def of_one_prompt(rows: Sequence[Row], most: int = 8) -> list[list[int]]:
    """Units for rows that need no other: those of one prompt together, at most so many."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(tuple(row.prompt), []).append(i)
    return [together[start : start + most] for together in found.values() for start in range(0, len(together), most)]


def parts(plan: Plan, tokens: int, at_least: int = 1) -> list[list[int]]:
    """Indexes of rows to go through the model together: units of like length, `tokens` with padding or one unit.

    Where `at_least` several are wanted and there are units for them, they are made so small that there are.
    """
    cost = [_cost([plan.rows[i] for i in unit]) for unit in plan.units]
    tokens = min(tokens, max(cost, default=0), -(-sum(cost) // at_least)) if at_least > 1 else tokens
    order = sorted(range(len(cost)), key=cost.__getitem__, reverse=True)  # the first of a part is its longest
    result = []
    while order:
        fit = max(1, tokens // cost[order[0]])
        result.append([row for unit in order[:fit] for row in plan.units[unit]])
        order = order[fit:]
    return result


def even_parts(plan: Plan, tokens: int, among: int = 1, known: int = 0) -> list[list[int]]:
    """Indexes of rows to go through a model that needs no padding: parts of about `tokens`, all of like size.

    Their number is a multiple of `among`, if there are units for that: so many, who share them, are done together. The
    first `known` tokens of each prompt are not counted.
    """
    cost = [_cost([plan.rows[i] for i in unit], known) for unit in plan.units]
    wanted = -(-sum(cost) // (tokens * among)) * among
    bins: list[tuple[int, int, list[int]]] = [(0, i, []) for i in range(min(wanted, len(cost)))]
    for unit in sorted(range(len(cost)), key=cost.__getitem__, reverse=True):  # longest first, to where there is least
        total, place, rows = bins[0]
        heapq.heapreplace(bins, (total + cost[unit], place, [*rows, *plan.units[unit]]))
    return [rows for *_, rows in sorted(bins, key=lambda each: (-each[0], each[1]))]


def _cost(rows: Sequence[Row], known: int = 0) -> int:
    """Tokens to read, a prompt that all share once; of each prompt so many are known."""
    answers = sum(len(row.completion) for row in rows)
    shared = all(row.prompt == rows[0].prompt for row in rows)
    return answers + sum(len(row.prompt) - known for row in (rows[:1] if shared else rows))


def _rows(fact: Tensor, indexes: Sequence[int], longest: int) -> Tensor:
    some = fact[torch.tensor(indexes, device=fact.device)]
    return some if some.dim() == 1 else some[:, :longest]


def _like(fact: Tensor, policy: Tensor) -> Tensor:
    return fact.to(policy) if fact.is_floating_point() else fact.to(policy.device)
