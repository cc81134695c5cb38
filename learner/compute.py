"""Passes of the models over rows: in parts that fit in memory, on one process or several, with the same result.

The leader says what is to be done, and each rank, the leader among them, does its share of it: so the followers hold
no state but the frozen base, and what they need of the rest comes with each job.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from learner import attention
from learner.activations import checkpointing, needs_checkpointing
from learner.algorithm import Algorithm
from learner.batch import Plan, even_parts, of_one_prompt, parts
from learner.lanes import side_by_side
from learner.logprobs import Row, completion_hidden, token_logprobs
from learner.policy import Policy
from learner.prefix import Prefix, beginning
from learner.ranks import ALONE, Ranks
from thumbwheel.errors import AdapterError

PART_TOKENS = 640
"""Tokens that go through the model together for a gradient: on a CPU more are no faster, and take more memory."""
READ_TOKENS = 1280
"""The same where nothing is kept for backward."""
CUDA_PART_TOKENS = 8192

KEPT_TOKENS = 2_000_000
"""Log-probs of the reference that are kept: 4 bytes each."""

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What all ranks do next, each with its share of `parts`: read the rows, or take the gradient of their loss.

    All prompts begin with the tokens of `prefix`, which each rank reads once.
    """

    plan: Plan
    parts: list[list[int]]
    prefix: list[int]
    weights: list[Tensor]
    backward: bool
    reference: bool = False


class Compute:
    """The leader's side. `algorithm` brings the loss and, it may be, a value head."""

    def __init__(self, policy: Policy, algorithm: Algorithm, ranks: Ranks = ALONE) -> None:
        self._policy = policy
        self.algorithm = algorithm
        self._ranks = ranks
        self._kept: OrderedDict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = OrderedDict()
        self._kept_tokens = 0

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's, and the value head's where there is one."""
        return trained(self._policy, self.algorithm)

    def read(self, rows: Sequence[Row], progress: Progress = lambda _: None) -> tuple[Tensor, Tensor | None]:
        """Log-probs under the policy and the value head's values, rows × longest answer; no gradient."""
        return self._do(_plan(rows), False, progress)

    def reference(self, rows: Sequence[Row], keep: bool = True, progress: Progress = lambda _: None) -> Tensor:
        """Log-probs under the reference, rows × longest answer; those of rows that were read before are at hand."""
        names = [(tuple(row.prompt), tuple(row.completion)) for row in rows]
        new = {name: row for name, row in zip(names, rows, strict=True) if name not in self._kept}
        found = {name: self._kept[name] for name in names if name in self._kept}
        if new:
            each, _ = self._do(_plan(list(new.values())), False, progress, reference=True)
            for (name, row), values in zip(new.items(), each, strict=True):
                found[name] = values[: len(row.completion)].clone()
        if keep:
            self._keep({name: found[name] for name in new})
        return pad_sequence([found[name] for name in names], batch_first=True)

    def _keep(self, new: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor]) -> None:
        self._kept |= new
        self._kept_tokens += sum(len(values) for values in new.values())
        while self._kept_tokens > KEPT_TOKENS:
            _, oldest = self._kept.popitem(last=False)
            self._kept_tokens -= len(oldest)

    def gradient(self, plan: Plan, progress: Progress = lambda _: None) -> tuple[Tensor, Tensor | None]:
        """Put the gradient of the plan's loss where the optimizer finds it; log-probs and values as `read` gives."""
        for parameter in self.parameters():
            parameter.grad = None
        return self._do(plan, True, progress)

    def _do(
        self, plan: Plan, backward: bool, progress: Progress, reference: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        several = self._ranks.size > 1
        weights = [parameter.detach() for parameter in self.parameters()] if several else []
        device = self._policy.device
        tokens = CUDA_PART_TOKENS if device.type == "cuda" else PART_TOKENS if backward else READ_TOKENS
        prefix: list[int] = []
        if attention.installed(self._policy.model):
            prefix = beginning([row.prompt for row in plan.rows])
            cut = even_parts(plan, tokens, self._ranks.size * lanes(device), len(prefix))
        else:
            cut = parts(plan, tokens, self._ranks.size)
        job = Job(plan, cut, prefix, weights, backward, reference)
        self._ranks.tell(job)
        # In the middle of common work nobody may leave: there, being stopped waits for its end.
        result = work(job, self._policy, self.algorithm, self._ranks, (lambda _: None) if several else progress)
        if several:
            progress(len(plan.rows))
        return result

    def dismiss(self) -> None:
        """There is nothing more to do for the followers."""
        self._ranks.tell(None)


def follow(policy: Policy, algorithm: Algorithm, ranks: Ranks) -> None:
    """A follower's life: do what the leader says until it says no more."""
    parameters = trained(policy, algorithm)
    while isinstance(job := ranks.hear(), Job):
        if [tuple(p.shape) for p in parameters] != [tuple(w.shape) for w in job.weights]:
            raise AdapterError("with several processes, [learner] rank has to be that of the version trained from")
        with torch.no_grad():
            for parameter, weights in zip(parameters, job.weights, strict=True):
                parameter.copy_(weights)
                parameter.grad = None
        work(job, policy, algorithm, ranks, lambda _: None)


def trained(policy: Policy, algorithm: Algorithm) -> list[torch.nn.Parameter]:
    """What an update may move, in an order that does not change."""
    return [*policy.parameters(), *(algorithm.head.parameters() if algorithm.head is not None else ())]


def work(
    job: Job, policy: Policy, algorithm: Algorithm, ranks: Ranks, progress: Progress
) -> tuple[Tensor, Tensor | None]:
    """Do this rank's share; log-probs and values of all rows, on every rank."""
    plan, longest = job.plan, max(len(row.completion) for row in job.plan.rows)
    parameters = trained(policy, algorithm)
    shape = (len(plan.rows), longest)
    logprobs = torch.zeros(shape, dtype=parameters[0].dtype, device=policy.device)
    values = torch.zeros_like(logprobs) if algorithm.head is not None and not job.reference else None
    share = ranks.share(job.parts)
    count = lanes(policy.device)
    known = len(job.prefix)
    most = max((sum(len(plan.rows[i]) - known for i in indexes) for indexes in share), default=0)
    checkpointing(policy.model, job.backward and needs_checkpointing(policy.model, count * most + known))

    def part(indexes: list[int]) -> tuple[list[int], Tensor, Tensor | None, Sequence[Tensor | None]]:
        with torch.set_grad_enabled(job.backward):
            rows = [plan.rows[i] for i in indexes]
            seen, valued = _forward(policy, rows, prefix, None if job.reference else algorithm.head)
            slopes: Sequence[Tensor | None] = ()
            if job.backward:
                loss, _ = algorithm(plan.batch(indexes, seen, valued))
                slopes = torch.autograd.grad(loss, [*parameters, *leaves], allow_unused=True)
        return indexes, seen.detach(), None if valued is None else valued.detach(), slopes

    with policy.reference() if job.reference else nullcontext():
        with torch.set_grad_enabled(job.backward):
            prefix = Prefix(policy.model, job.prefix) if job.prefix and share else None
        leaves = [] if prefix is None else prefix.leaves
        totals = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
        with side_by_side(part, share, count) as results:
            for indexes, seen, valued, slopes in results:  # in their order, so that sums come out the same
                logprobs[indexes, : seen.shape[1]] = seen.to(logprobs)
                if values is not None and valued is not None:
                    values[indexes, : seen.shape[1]] = valued.to(values)
                _add(parameters, slopes[: len(parameters)])
                for total, slope in zip(totals, slopes[len(parameters) :], strict=True):
                    total += 0 if slope is None else slope
                progress(len(indexes))
        if prefix is not None and leaves:
            _add(parameters, prefix.gradient(totals, parameters))
    checkpointing(policy.model, on=False)
    both = [logprobs] if values is None else [logprobs, values]
    if job.backward:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        ranks.add([*both, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
    else:
        ranks.add(both)
    return logprobs, values


def _add(parameters: Sequence[torch.nn.Parameter], slopes: Sequence[Tensor | None]) -> None:
    for parameter, slope in zip(parameters, slopes, strict=False):
        if slope is not None:
            parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)


def lanes(device: torch.device) -> int:
    """How many parts go through the model side by side: two on a CPU, where torch has the threads for that."""
    return 2 if device.type == "cpu" and torch.get_num_threads() > 1 else 1


def _forward(
    policy: Policy, rows: Sequence[Row], prefix: Prefix | None, head: torch.nn.Linear | None
) -> tuple[Tensor, Tensor | None]:
    hidden = completion_hidden(policy.model, rows, prefix)
    targets = torch.tensor([id for row in rows for id in row.completion], device=policy.device)
    lengths = [len(row.completion) for row in rows]
    each = token_logprobs(policy.model, hidden, targets)
    logprobs = pad_sequence(list(torch.split(each, lengths)), batch_first=True)
    if head is None:
        return logprobs, None
    values = head(hidden.detach().to(head.weight)).squeeze(-1)
    return logprobs, pad_sequence(list(torch.split(values, lengths)), batch_first=True)


def _plan(rows: Sequence[Row]) -> Plan:
    return Plan(list(rows), list(range(len(rows))), units=of_one_prompt(rows))
