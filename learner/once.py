"""One update over a recorded log: `thumbwheel learn --from LOG`. Nothing of it is kept, and the log stays as it is.

It is what a learner would do first that starts today on this log, from the base model and with nothing learned yet. No
candidate comes of it: those are the daemon's alone.
"""

import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from learner import algorithms, fresh, kl, reward_model
from learner.algorithm import Figures
from learner.compute import Compute
from learner.examples import Examples, Pair, Thumb, spent, without
from learner.models import LearnerModels
from learner.policy import Policy
from learner.progress import task
from learner.recording import Recording, open_recording
from learner.reward_model import RewardModel
from learner.reward_report import FitReport
from learner.trainer import Refused, Trainer
from thumbwheel.errors import ThumbwheelError
from thumbwheel.settings import Settings


class NothingLearned(ThumbwheelError):
    """The log does not hold what an update takes, or nothing can be learned from what it holds."""

    exit_code = 6


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An example of the batch that was not learned from: the ids of its votes, and why."""

    feedback_ids: list[str]
    why: str


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL to the reference of the policy after the update, on `n` held-out prompts: nats a sequence, and a token."""

    mean: float
    upper: float
    per_token: float
    n: int
    confidence: float
    budget: float

    @property
    def inside(self) -> bool:
        return self.upper <= self.budget


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one update did. `figures` are the algorithm's, of the policy as its batch met it last: before the last step.

    `grad_norm` is the largest before clipping, `tokens` are those of the rows gone over, prompts included, in `seconds`
    of the update alone. `peak_bytes` is the largest the process has been, `peak_device_bytes` what torch held of a GPU.
    """

    log: str
    algorithm: str
    ups: int
    downs: int
    pairs: int
    unreadable: int
    figures: Figures
    grad_norm: float
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    peak_device_bytes: int | None
    left_out: list[LeftOut]
    reward: FitReport | None
    kl: Divergence


def learn(settings: Settings, where: str) -> Outcome:
    """One update by the algorithm that is set, over the log at `where` (see `open_recording`).

    Raises NothingLearned with the reasons, and whatever keeps the settings, the log, the base model or an engine from
    being used.
    """
    chosen, needs = settings.learner, algorithms.find(settings.learner).needs
    never = threading.Event()  # Ctrl-C ends it by KeyboardInterrupt
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    with ExitStack() as stack:
        recording = stack.enter_context(open_recording(settings, where))
        if missing := recording.lacks(needs):
            raise NothingLearned(f"{chosen.algorithm} cannot learn from {where}: {'; '.join(missing)}")
        examples = recording.batch(needs)
        policy = Policy.load(settings)
        algorithm = algorithms.make(chosen, policy.width)
        compute = Compute(policy, algorithm)
        random = torch.Generator().manual_seed(chosen.seed)
        source = stack.enter_context(_source(settings, policy, random)) if needs.fresh else None
        models = LearnerModels(policy, compute, chosen, recording.held_out, random, never, source)
        if needs.fresh:
            models.reward = _fit(settings, recording, policy, random, never)
        trainer = Trainer(policy, chosen, algorithm, compute, models)
        with task(f"update by {chosen.algorithm}", trainer.rows(examples), never) as progress:
            result = trainer.update(examples, progress)
        left_out = [LeftOut(spent(examples[i : i + 1]), why) for i, why in result.left_out.items()]
        if isinstance(result, Refused):
            raise NothingLearned(_refusal(chosen.algorithm, result, examples))
        learned = without(examples, result.left_out)
        ups = sum(isinstance(example, Thumb) and example.up for example in learned)
        pairs = sum(isinstance(example, Pair) for example in learned)
        return Outcome(
            log=where,
            algorithm=chosen.algorithm,
            ups=ups,
            downs=len(learned) - ups - pairs,
            pairs=pairs,
            unreadable=len(recording.unreadable),
            figures=result.figures,
            grad_norm=result.grad_norm,
            steps=result.steps,
            tokens=result.tokens,
            seconds=result.seconds,
            tokens_per_second=result.tokens / result.seconds,
            kl=_measure(settings, recording, policy, random, never),
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            peak_device_bytes=torch.cuda.max_memory_allocated() if policy.device.type == "cuda" else None,
            left_out=left_out,
            reward=models.reward.report if models.reward is not None else None,
        )


@contextmanager
def _source(settings: Settings, policy: Policy, random: torch.Generator) -> Iterator[fresh.Source]:
    """As the daemon has one; an engine sees the learner's files, in a directory that no other learner has."""
    url = settings.learner.fresh.engine
    if not url:
        yield fresh.Memory(policy, random)
        return
    place = settings.path(Path("learner"))
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="once-", dir=place) as directory:
        Path(directory).chmod(0o755)  # the engine may run as another user
        with fresh.Engine(url, policy, Path(directory)) as engine:
            yield engine


def _fit(
    settings: Settings, recording: Recording, policy: Policy, random: torch.Generator, stop: threading.Event
) -> RewardModel:
    chosen, (thumbs, pairs) = settings.learner, recording.votes()
    total = reward_model.work(len(thumbs), len(pairs), chosen)
    prompts = recording.held_out(chosen.reward.samples)
    with task(f"reward model from {len(thumbs)} votes", total, stop) as progress:
        try:
            return reward_model.fit(policy, thumbs, pairs, prompts, chosen, random, progress)
        except reward_model.NoSignal as error:
            raise NothingLearned(f"no reward model, and {chosen.algorithm} needs one: {error}") from error


def _measure(
    settings: Settings, recording: Recording, policy: Policy, random: torch.Generator, stop: threading.Event
) -> Divergence:
    chosen, prompts = settings.learner, recording.held_out(settings.learner.kl_samples)
    with task("KL to the reference", kl.work(len(prompts), chosen.max_tokens), stop) as progress:
        found = kl.measure(policy, prompts, chosen.max_tokens, chosen.kl_confidence, random, progress)
    confidence, budget = chosen.kl_confidence, chosen.kl_budget
    return Divergence(found.mean, found.upper, found.per_token, len(prompts), confidence, budget)


def _refusal(algorithm: str, result: Refused, examples: Examples) -> str:
    each = [f"{' and '.join(spent(examples[i : i + 1]))}: {why}" for i, why in result.left_out.items()]
    return "\n  ".join([f"{algorithm} refuses the batch of {len(examples)}: {result.why}", *each])
