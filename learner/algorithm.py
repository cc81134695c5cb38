"""What an algorithm is: a function from a batch to a loss and its diagnostics, and what it has to know before.

One file an algorithm; `algorithms.py` has the list of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from learner.batch import Batch, Plan
from learner.examples import Examples, Pair, Thumb
from learner.logprobs import Row
from thumbwheel.settings import LearnerSettings

if TYPE_CHECKING:
    from learner.fresh import Fresh

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Needs:
    """What an algorithm learns from: thumbs of both ratings unless it takes pairs.

    `logprobs`: as they were recorded when an answer was sampled. `fresh`: answers sampled now, under the adapter in
    training, and the reward model that scores them.
    """

    pairs: bool = False
    logprobs: bool = False
    fresh: bool = False


class Unusable(Exception):
    """Nothing can be learned from these examples; no weight has moved. Those of `left_out` must not come again."""

    def __init__(self, why: str, left_out: Mapping[int, str]) -> None:
        super().__init__(why)
        self.left_out = left_out


class Models(Protocol):
    """What an algorithm may ask of the models. Log-probs are rows × longest answer, zero behind its end; nats."""

    parent: str
    """The version that training started from."""

    def policy(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        """Log-probs under the policy as it is, and what the algorithm's value head makes of each token."""
        ...

    def reference(self, rows: Sequence[Row], keep: bool = True) -> Tensor:
        """Log-probs under the reference; each row's are computed once and kept, unless it will not come again."""
        ...

    def measured_kl(self) -> float:
        """KL of the policy as it is to the reference on a few held-out prompts, nats an answer."""
        ...

    def fresh(self, prompts: Sequence[list[int]]) -> "list[list[Fresh]]":
        """Answers to each prompt, sampled from the policy as it is."""
        ...

    def rewards(self, rows: Sequence[Row]) -> Tensor:
        """What the reward model makes of each answer: zero for a usual one of the reference, in its spreads."""
        ...


class Algorithm:
    """Made with the settings. `plan` is asked once an update, the function once for each batch and once for the whole.

    What it remembers from update to update is in `state`; a value head, where there is one, is in `head`.
    """

    needs: ClassVar[Needs] = Needs()

    def __init__(self, settings: LearnerSettings, width: int) -> None:
        """`width` is that of the model's hidden states."""
        self.settings = settings
        self.head: torch.nn.Linear | None = None

    @property
    def passes(self) -> int:
        """How often a plan is gone over: fresh answers cost so much that once is a waste."""
        return self.settings.fresh.epochs if self.needs.fresh else 1

    @property
    def minibatches(self) -> int:
        """Optimizer steps in a pass."""
        return self.settings.fresh.minibatches if self.needs.fresh else 1

    def plan(self, examples: Examples, models: Models) -> Plan:
        """What to go over. Raises Unusable."""
        raise NotImplementedError

    def __call__(self, batch: Batch) -> tuple[Tensor, Figures]:
        """The loss, a sum over the batch's rows or tokens in proportion to the whole's, and what a person looks at.

        Figures are of the batch alone; "loss" is among them.
        """
        raise NotImplementedError

    def enough(self, batch: Batch) -> bool:
        """Whether to leave the plan alone: asked before each step but the first of an update."""
        return False

    def after(self, whole: Batch) -> None:
        """An update is over; the whole plan as the policy saw it last."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep: tensors and numbers."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave."""


def figures(diagnostics: Any) -> Figures:
    """A dataclass of diagnostics as figures, with the margin where it has one."""
    margin = getattr(diagnostics, "margin", None)
    return asdict(diagnostics) | ({} if margin is None else {"margin": margin})


def thumbs_of(examples: Examples) -> list[Thumb]:
    """Raises TypeError where pairs were given."""
    thumbs = [example for example in examples if isinstance(example, Thumb)]
    if len(thumbs) != len(examples) or not thumbs:
        raise TypeError("this algorithm learns from thumbs, at least one")
    return thumbs


def pairs_of(examples: Examples) -> list[Pair]:
    """Raises TypeError where thumbs were given."""
    pairs = [example for example in examples if isinstance(example, Pair)]
    if len(pairs) != len(examples) or not pairs:
        raise TypeError("this algorithm learns from pairs, at least one")
    return pairs
