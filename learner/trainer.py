"""One update: examples move the adapter, by as many optimizer steps as the algorithm takes, or are refused."""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from learner.algorithm import Algorithm, Figures, Models, Unusable
from learner.batch import Plan
from learner.compute import Compute
from learner.examples import Examples
from learner.policy import Policy
from thumbwheel.errors import ThumbwheelError
from thumbwheel.settings import LearnerSettings


@dataclass(frozen=True, slots=True)
class Updated:
    """What one update did: figures of the whole of it, `steps` of the optimizer, which examples it left out and why.

    `tokens` are those of the rows that were learned from, prompts included; `grad_norm` is the adapter's, the largest
    before clipping.
    """

    figures: Figures
    grad_norm: float
    steps: int
    tokens: int
    seconds: float
    left_out: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """No weight moved; which examples are to blame, and why. The others may come again. `why` is of the whole batch."""

    left_out: Mapping[int, str]
    why: str


class Trainer:
    """The optimizer of one cycle. A new one is made whenever the policy starts from a version anew."""

    def __init__(
        self, policy: Policy, settings: LearnerSettings, algorithm: Algorithm, compute: Compute, models: Models
    ) -> None:
        self._policy = policy
        self._settings = settings
        self._algorithm = algorithm
        self._compute = compute
        self._models = models
        self._shuffle = torch.Generator().manual_seed(settings.seed)
        groups = [{"params": policy.parameters(), "lr": settings.learning_rate}]
        if algorithm.head is not None:
            groups.append({"params": list(algorithm.head.parameters()), "lr": settings.ppo.value_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def update(self, examples: Examples, progress: Callable[[int], None] = lambda _: None) -> Updated | Refused:
        """Learn from a batch. `progress` is called with the number of rows that were just dealt with.

        Raises ThumbwheelError where the gradient is not finite although each log-prob is: then something is wrong with
        the model itself. Whatever it raises, the weights are those of before, and so are optimizer and algorithm.
        """
        started = time.perf_counter()
        before = self._snapshot()
        try:
            plan = self._algorithm.plan(examples, self._models)
            done = self._go_over(plan, progress)
        except Unusable as unusable:
            self._go_back(before)
            return Refused(unusable.left_out, str(unusable))
        except BaseException:
            self._go_back(before)
            raise
        norm, steps, policy, values = done
        whole = plan.batch(range(len(plan.rows)), policy, values)
        _, figures = self._algorithm(whole)
        self._algorithm.after(whole)
        seconds = time.perf_counter() - started
        return Updated(figures, norm, steps, sum(map(len, plan.rows)), seconds, plan.left_out)

    def rows(self, examples: Examples) -> int:
        """How many rows an update from these goes over, pass after pass: what `progress` adds up to."""
        needs = self._algorithm.needs
        each = 2 if needs.pairs else self._settings.fresh.answers if needs.fresh else 1
        return len(examples) * each * self._algorithm.passes

    def _go_over(self, plan: Plan, progress: Callable[[int], None]) -> tuple[float, int, Tensor, Tensor | None]:
        """Pass after pass; the largest norm, the steps taken, and each row's log-probs and values as last seen."""
        largest, steps = 0.0, 0
        policy: Tensor | None = None
        values: Tensor | None = None
        for _ in range(self._algorithm.passes):
            for indexes in self._minibatches(plan):
                some = plan.select(indexes) if len(indexes) < len(plan.rows) else plan
                seen, valued = self._compute.gradient(some, progress)
                _check(seen, some)
                if policy is None:  # what is not reached is as it was
                    longest = max(len(row.completion) for row in plan.rows)
                    policy = plan.facts.get("old", torch.zeros(len(plan.rows), longest)).clone().to(seen)
                    values = None if valued is None else plan.facts["values"].clone().to(seen)
                policy[indexes, : seen.shape[1]] = seen
                if values is not None and valued is not None:
                    values[indexes, : seen.shape[1]] = valued
                if steps and self._algorithm.enough(some.batch(range(len(some.rows)), seen, valued)):
                    return largest, steps, policy, values
                largest = max(largest, self._step())
                steps += 1
        assert policy is not None
        return largest, steps, policy, values

    def _minibatches(self, plan: Plan) -> list[list[int]]:
        """Rows of each step of a pass: units dealt at random, all in their order where there is one step."""
        count = min(self._algorithm.minibatches, len(plan.units))
        if count == 1:
            return [list(range(len(plan.rows)))]
        order = torch.randperm(len(plan.units), generator=self._shuffle).tolist()
        return [[row for unit in order[start::count] for row in plan.units[unit]] for start in range(count)]

    def _step(self) -> float:
        most, head = self._settings.max_grad_norm, self._algorithm.head
        norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), most).item()
        # On its own: values are many times as large as log-ratios, and would leave nothing of the policy's gradient.
        of_head = 0.0 if head is None else torch.nn.utils.clip_grad_norm_(head.parameters(), most).item()
        if not math.isfinite(norm + of_head):
            raise ThumbwheelError("the gradient of an update is not finite: no weight was moved. Check the base model")
        self.optimizer.step()
        return norm

    def _snapshot(self) -> tuple[list[Tensor], dict[str, Any]]:
        return [parameter.detach().clone() for parameter in self._compute.parameters()], copy.deepcopy(self.state())

    @torch.no_grad()
    def _go_back(self, before: tuple[list[Tensor], dict[str, Any]]) -> None:
        weights, state = before
        for parameter, value in zip(self._compute.parameters(), weights, strict=True):
            parameter.copy_(value)
            parameter.grad = None
        self.restore(state)

    def state(self) -> dict[str, Any]:
        """Of optimizer and algorithm, for a checkpoint; the adapter's weights are not in it."""
        head = self._algorithm.head
        return {
            "optimizer": self.optimizer.state_dict(),
            "algorithm": self._algorithm.state(),
            "head": None if head is None else head.state_dict(),
            "shuffle": self._shuffle.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with a state that `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._algorithm.restore(state["algorithm"])
        if self._algorithm.head is not None:
            self._algorithm.head.load_state_dict(state["head"])
        self._shuffle.set_state(state["shuffle"])


def _check(policy: Tensor, plan: Plan) -> None:
    """Raise Unusable where the model gives an answer log-probs that are no numbers."""
    bad = (~policy.isfinite().all(-1)).nonzero().squeeze(-1).tolist()
    known = plan.facts.get("reference")
    if known is not None:
        bad += (~known.isfinite().all(-1)).nonzero().squeeze(-1).tolist()
    if bad:
        why = "the model gives it log-probs that are not finite"
        raise Unusable(why, {plan.owners[row]: why for row in bad})
