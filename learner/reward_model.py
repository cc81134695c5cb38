"""The reward model: fitted to thumbs and pairs, tried on prompts that it has not seen, in units of the reference.

`scorer.py` is its network, `reward.py` has its losses, `reward_training.py` learns them. After the fit the held-out
votes are scored, effects left out, and it is refused (`NoSignal`) unless the lower bound says that it tells them apart:
by the AUC of thumbs or, only where these are too few, by the accuracy of pairs.

What this does not cover:
- A hidden state tells much about an answer's length. Where users want short answers and nothing else, the length effect
  takes most of that off the score but not all, the AUC sees what is left, and calibration makes it as large as any
  other reward: 64 such votes left s with a spread of 0.1 logits, −0.75 correlated with length. Look at the report's
  `length_spearman`.
- The AUC is over prompts. A score that only knows which questions please passes, and says nothing about two answers to
  one prompt: the report has `spread_within` beside `spread`.
- At 95%, one fit in twenty to mere noise passes.
"""

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from learner import reward, reward_store
from learner.examples import Pair, Thumb
from learner.logprobs import Row
from learner.policy import Policy
from learner.reward_report import FitReport, HeldOut, measure
from learner.reward_store import RewardManifest
from learner.reward_training import Context, Votes, split, train
from learner.sampler import sample
from learner.scorer import Scorer
from thumbwheel.errors import AdapterError, SettingsError, ThumbwheelError
from thumbwheel.settings import LearnerSettings
from thumbwheel.statistics import Interval

AT_LEAST = 5
"""Held-out thumbs of either rating, or pairs, without which nothing is tested."""

Progress = Callable[[int], None]


class NoSignal(ThumbwheelError):
    """The votes do not say what a good answer is, or too few of them are held out to tell."""


class RewardModel:
    """Scores answers on the policy's base model; the policy is not touched by it. Made by `fit` or `load`."""

    def __init__(self, scorer: Scorer, manifest: RewardManifest) -> None:
        self._scorer = scorer
        self._manifest = manifest

    @property
    def report(self) -> FitReport:
        """What the fit saw."""
        return self._manifest.report

    def score(self, rows: Sequence[Row], progress: Progress = lambda _: None) -> Tensor:
        """The score of each row, N in fp32 on the CPU, without a zero or a unit. `progress` gets the rows just read."""
        return self._scorer.score(rows, progress)

    def rewards(self, rows: Sequence[Row], progress: Progress = lambda _: None) -> Tensor:
        """Scores less the mean, over the spread, of the reference's answers; at most ±5. N in fp32 on the CPU."""
        return self._manifest.calibration.rewards(self.score(rows, progress))

    def save(self, directory: Path) -> str:
        """Write it as the next version in `directory`, whole or not at all; returns the version, such as r3."""
        return reward_store.write(directory, self._manifest, self._scorer.weights())

    @classmethod
    def load(cls, policy: Policy, directory: Path, version: str = "") -> "RewardModel":
        """Read a version, the newest by default.

        Raises AdapterError where there is none, it was altered, or it was fitted on another base model.
        """
        manifest, weights = reward_store.read(directory, version)
        if manifest.base_model != policy.base_fingerprint:
            raise AdapterError(
                f"reward model {manifest.version} was fitted on the base model {manifest.base_model}, and [engine] "
                f"model is {policy.base_fingerprint}: point [engine] model at its base model, or fit another"
            )
        replaced = torch.Generator().manual_seed(0)
        scorer = Scorer(policy, manifest.rank, manifest.lora_alpha, manifest.target_modules, replaced)
        scorer.set_weights(weights)
        return cls(scorer, manifest)


def work(thumbs: int, pairs: int, settings: LearnerSettings) -> int:
    """The most steps that `fit` reports: a row read in an epoch, when held out or of the reference, a step sampled."""
    return settings.reward.epochs * (thumbs + 2 * pairs) + settings.reward.samples + settings.max_tokens


def fit(
    policy: Policy,
    thumbs: Sequence[Thumb],
    pairs: Sequence[Pair],
    prompts: Sequence[list[int]],
    settings: LearnerSettings,
    generator: torch.Generator,
    progress: Progress = lambda _: None,
) -> RewardModel:
    """Learn a reward model from all of these votes; those without trust are left out.

    The reference is sampled on the first of `prompts`, two answers each, or more where there are few. `progress` is
    called as the work goes on, with its part of `work`. Raises NoSignal, with the figures, where held-out votes are too
    few or are not told apart, or the reference's answers all score alike; SettingsError where there are no prompts;
    ThumbwheelError where the model's numbers are not finite.
    """
    started = time.perf_counter()
    if not prompts:
        raise SettingsError("there are no prompts to sample the reference on: rewards would have no zero and no unit")
    learned, held_out = enough(thumbs, pairs, settings)
    scorer = Scorer(policy, settings.rank, settings.lora_alpha, settings.target_modules, generator)
    context = Context(learned.thumbs)
    loss = train(scorer, context, learned, settings, generator, progress)
    tested = _test(scorer, context, held_out, progress)
    _check_signal(tested)
    calibration, within = _calibrate(scorer, prompts, settings, generator, progress)
    report = FitReport(
        thumbs=len(learned.thumbs),
        pairs=len(learned.pairs),
        held_out=tested,
        length_effect=context.effects.length.item(),
        loss=loss,
        mean=calibration.mean,
        spread=calibration.spread,
        spread_within=within,
        seconds=time.perf_counter() - started,
    )
    manifest = RewardManifest(
        base_model=policy.base_fingerprint,
        created=time.time(),
        votes=len({t.feedback_id for t in thumbs} | {id for pair in pairs for id in pair.feedback_ids}),
        rank=settings.rank,
        lora_alpha=settings.lora_alpha,
        target_modules=settings.target_modules,
        calibration=calibration,
        report=report,
        settings=settings.model_dump(mode="json"),
    )
    return RewardModel(scorer, manifest)


def enough(thumbs: Sequence[Thumb], pairs: Sequence[Pair], settings: LearnerSettings) -> tuple[Votes, Votes]:
    """What `fit` learns from and what it holds out. Raises NoSignal where either is too little."""
    share = settings.reward.held_out
    learned, held_out = split(thumbs, pairs, share)
    ups = sum(thumb.up for thumb in held_out.thumbs)
    downs = len(held_out.thumbs) - ups
    missing = {"thumbs up": AT_LEAST - ups, "thumbs down": AT_LEAST - downs}
    testable = max(missing.values()) <= 0 or len(held_out.pairs) >= AT_LEAST
    if testable and len(learned):
        return learned, held_out
    if testable:
        raise NoSignal("every vote is on a prompt that is held out: there is nothing to learn from, more are needed")
    wanted = " and ".join(f"{n} more {what}" for what, n in missing.items() if n > 0)
    raise NoSignal(
        f"too few votes to test a reward model on: of prompts, {share:.0%} are held out, and on those there are {ups} "
        f"thumbs up, {downs} thumbs down and {len(held_out.pairs)} pairs. It takes {wanted} on such prompts, or "
        f"{AT_LEAST - len(held_out.pairs)} more pairs: about {1 / share:.0f} times as many in all"
    )


def _test(scorer: Scorer, context: Context, votes: Votes, progress: Progress) -> HeldOut:
    thumbs, pairs = votes.thumbs, votes.pairs
    rows = [Row(thumb.prompt, thumb.completion) for thumb in thumbs]
    rows += [Row(pair.prompt, pair.chosen) for pair in pairs] + [Row(pair.prompt, pair.rejected) for pair in pairs]
    scores, chosen, rejected = torch.split(scorer.score(rows, progress), [len(thumbs), len(pairs), len(pairs)])
    return measure(thumbs, pairs, scores, context(thumbs), chosen, rejected)


def _check_signal(tested: HeldOut) -> None:
    """Raise NoSignal where chance would do as well on the held-out votes."""
    enough = min(tested.ups, tested.downs) >= AT_LEAST
    deciding = tested.auc if enough else tested.pair_accuracy
    assert deciding is not None
    if deciding.low > 0.5:
        return
    what = "a thumb up higher than a thumb down" if enough else "the better answer of a pair higher"
    also = "" if not enough or tested.pair_accuracy is None else f"; of pairs, {_words(tested.pair_accuracy)}"
    raise NoSignal(
        f"the votes teach no reward: on prompts held out it scores {what} in {_words(deciding)}{also}. Chance is 50%, "
        f"and the lower bound has to be above. They were {tested.ups} up, {tested.downs} down, {tested.pairs} pairs: "
        "more votes narrow the interval; a signal that is not there they cannot bring"
    )


def _words(share: Interval) -> str:
    return f"{share.estimate:.0%} of cases (from {share.low:.0%} to {share.high:.0%}, 95% sure of either end)"


def _calibrate(
    scorer: Scorer,
    prompts: Sequence[list[int]],
    settings: LearnerSettings,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[reward.Calibration, float]:
    """The zero and the unit of rewards, and the spread of scores among answers to one prompt."""
    number = settings.reward.samples
    asked = list(islice(cycle(prompts[: (number + 1) // 2]), number))
    policy = scorer.policy
    with policy.reference():
        rows = sample(policy.model, asked, settings.max_tokens, policy.stop, generator, progress)
    scores = scorer.score(rows, progress)
    try:
        calibration = reward.calibrate(scores)
    except ValueError as error:
        raise NoSignal(str(error)) from error
    groups: dict[tuple[int, ...], list[float]] = {}
    for prompt, score in zip(asked, scores.tolist(), strict=True):
        groups.setdefault(tuple(prompt), []).append(score)
    squares = sum((score - fmean(group)) ** 2 for group in groups.values() for score in group)
    return calibration, (squares / (number - len(groups))) ** 0.5
