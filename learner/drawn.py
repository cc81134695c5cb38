"""Fresh answers as PPO and GRPO learn from them: with their rewards, and with the log-probs they were drawn at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.algorithm import Models
from learner.examples import Thumb
from learner.logprobs import Row

CHECKED = 8
"""Answers of an engine whose log-probs are compared with the learner's own."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Answers to the prompts of an update, group by group: of row i, its prompt is that of thumb `groups[i]`.

    `old` are the policy's own log-probs, rows × longest answer; `values` are what a value head made of each token.
    `rewards` are in spreads of the reference's scores, less the penalty where the answer was cut off.
    """

    rows: list[Row]
    groups: list[int]
    rewards: Tensor
    ended: Tensor
    old: Tensor
    values: Tensor | None

    @property
    def units(self) -> list[list[int]]:
        """Rows of one group."""
        found: dict[int, list[int]] = {}
        for row, group in enumerate(self.groups):
            found.setdefault(group, []).append(row)
        return list(found.values())


def draw(thumbs: Sequence[Thumb], models: Models, penalty: float) -> Drawn:
    """Sample, score, and let the policy read what was sampled. Raises ThumbwheelError where an engine fails."""
    from learner.fresh import check_served

    answers = models.fresh([thumb.prompt for thumb in thumbs])
    each = [(group, answer) for group, some in enumerate(answers) for answer in some]
    rows = [answer.row for _, answer in each]
    ended = torch.tensor([answer.ended for _, answer in each])
    old, values = models.policy(rows)
    if some := [answer for _, answer in each if answer.behaviour is not None][:CHECKED]:
        reference = models.reference([answer.row for answer in some], keep=False)
        lengths = [len(answer.row.completion) for answer in some]
        ours, theirs = ([log[:n] for log, n in zip(logs, lengths, strict=False)] for logs in (old, reference))
        check_served(some, ours, theirs)
    rewards = models.rewards(rows).to(old) - penalty * ~ended
    return Drawn(rows, [group for group, _ in each], rewards, ended, old, values)
