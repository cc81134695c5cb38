"""One update: a batch of votes moves the adapter by one optimizer step, or is refused before a weight moves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from learner import kto
from learner.buffer import Example
from learner.logprobs import Row, buckets, sequence_logprobs
from learner.policy import Policy
from thumbwheel.errors import ThumbwheelError
from thumbwheel.settings import LearnerSettings


@dataclass(frozen=True, slots=True)
class Updated:
    """What one update did. `tokens` are those that were read, prompts included; `grad_norm` is before clipping."""

    diagnostics: kto.Diagnostics
    grad_norm: float
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Refused:
    """No weight moved: the model gives these votes log-probs that are no numbers."""

    feedback_ids: list[str]


class Trainer:
    """The optimizer of one cycle. A new one is made whenever the policy starts from a version anew."""

    def __init__(self, policy: Policy, settings: LearnerSettings) -> None:
        self._policy = policy
        self._settings = settings
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)

    def update(
        self, examples: Sequence[Example], progress: Callable[[int], None] = lambda _: None
    ) -> Updated | Refused:
        """One step of KTO on a batch. `progress` is called with the number of examples that were just dealt with.

        Each row's reference log-prob is computed once, in the pass that computes the policy's. Raises ThumbwheelError
        where the gradient is not finite although each log-prob is: then something is wrong with the model itself.
        """
        started = time.perf_counter()
        chosen = self._settings
        rows = [Row(example.prompt, example.completion) for example in examples]
        ups = torch.tensor([example.up for example in examples])
        weights = torch.tensor(kto.class_weights(ups.tolist(), chosen.weight_up, chosen.weight_down))
        logprobs = torch.zeros(2, len(rows))  # policy and reference
        self.optimizer.zero_grad()
        for bucket in buckets(rows):
            part = [rows[i] for i in bucket]
            with torch.no_grad(), self._policy.reference():
                reference = sequence_logprobs(self._policy.model, part)
            policy = sequence_logprobs(self._policy.model, part)
            each = kto.losses(policy, reference, ups[bucket].to(policy.device), weights[bucket].to(policy), chosen.beta)
            torch.autograd.backward(each.sum() / len(rows))
            logprobs[:, bucket] = torch.stack([policy.detach(), reference]).to(logprobs)
            progress(len(bucket))
        finite = logprobs.isfinite().all(0)
        if not finite.all():
            self.optimizer.zero_grad()
            return Refused([example.feedback_id for example, good in zip(examples, finite, strict=True) if not good])
        norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), chosen.max_grad_norm).item()
        if not torch.tensor(norm).isfinite():
            self.optimizer.zero_grad()
            raise ThumbwheelError("the gradient of an update is not finite: no weight was moved. Check the base model")
        self.optimizer.step()
        diagnostics = kto.diagnose(logprobs[0], logprobs[1], ups, weights, chosen.beta)
        return Updated(diagnostics, norm, sum(map(len, rows)), time.perf_counter() - started)

    def state(self) -> dict[str, Any]:
        """The optimizer's state, for a checkpoint."""
        return self.optimizer.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with a state that `state` gave."""
        self.optimizer.load_state_dict(state)
