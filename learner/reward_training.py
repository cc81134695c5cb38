"""How the reward model learns: effects and scores in turn, the scores from batches of thumbs and pairs mixed.

The effects are scalars, and given the scores their loss is convex: before each epoch, and after the last, they are put
where it is least, ridge and all; at first with all scores zero, so that the scores learn what they leave. (Steps of
Adam would not do: they move a user's effect as far for one vote as for a hundred.) The scores take steps of AdamW, at a
rate that falls to zero on a straight line. `joint_weights` is taken over all votes, so that a batch may hold any number
of either kind.
"""

import hashlib
import logging
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner import reward
from learner.examples import Pair, Thumb
from learner.logprobs import Row, buckets
from learner.scorer import Scorer
from thumbwheel.errors import ThumbwheelError
from thumbwheel.settings import LearnerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Votes:
    """What is learned from, or tested on."""

    thumbs: list[Thumb]
    pairs: list[Pair]

    def __len__(self) -> int:
        return len(self.thumbs) + len(self.pairs)


def split(thumbs: Sequence[Thumb], pairs: Sequence[Pair], share: float) -> tuple[Votes, Votes]:
    """Votes to learn from and votes held out, by their prompts: always the same prompts, never one on both sides.

    `share` is that of prompts held out. Votes without trust are in neither.
    """

    def part(held_out: bool) -> Votes:
        return Votes(
            [thumb for thumb in thumbs if thumb.trust > 0 and _held_out(thumb.prompt, share) is held_out],
            [pair for pair in pairs if pair.trust > 0 and _held_out(pair.prompt, share) is held_out],
        )

    return part(False), part(True)


def _held_out(prompt: list[int], share: float) -> bool:
    # Salted, to be independent of the prompts that are set aside for measuring KL, which go by a hash as well.
    digest = hashlib.sha256(b"reward model" + array("q", prompt).tobytes()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


class Context:
    """What a thumb's logit holds beside the score: the rate of ups, and effects of its user, its topic and its length.

    An intercept is the rate; it is no part of the ridge. On the CPU, in fp64.
    """

    def __init__(self, thumbs: Sequence[Thumb]) -> None:
        """Users and topics of other thumbs than these are unknown, and so is one without a name: no effect."""
        self._users = _indexes(thumb.user for thumb in thumbs)
        self._topics = _indexes(thumb.topic for thumb in thumbs)
        self.effects = reward.Effects(len(self._users), len(self._topics)).double()
        self.intercept = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def __call__(self, thumbs: Sequence[Thumb]) -> Tensor:
        """Intercept + u + t + l of each thumb, fp32."""
        return self._logits(self._facts(thumbs)).float()

    def fit(self, thumbs: Sequence[Thumb], scores: Tensor, ridge: float) -> None:
        """Go where Σ trust · loss + ridge is least for these scores."""
        if not thumbs:
            return
        facts, scores = self._facts(thumbs), scores.double()
        ups = torch.tensor([thumb.up for thumb in thumbs])
        trust = torch.tensor([thumb.trust for thumb in thumbs], dtype=torch.float64)
        parameters = [self.intercept, *self.effects.parameters()]
        optimizer = torch.optim.LBFGS(parameters, max_iter=200, tolerance_change=1e-12, line_search_fn="strong_wolfe")

        def loss() -> float:
            optimizer.zero_grad()
            each = reward.thumb_losses(scores, self._logits(facts), ups, trust)
            return _backward((each.sum() + self.effects.ridge(ridge)) / len(thumbs))

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    def _logits(self, facts: Sequence[Tensor]) -> Tensor:
        effects: Tensor = self.effects(*facts)
        return self.intercept + effects

    def _facts(self, thumbs: Sequence[Thumb]) -> list[Tensor]:
        users = [self._users.get(thumb.user, -1) for thumb in thumbs]
        topics = [self._topics.get(thumb.topic, -1) for thumb in thumbs]
        tokens = [len(thumb.completion) for thumb in thumbs]
        return [torch.tensor(each, dtype=torch.long) for each in (users, topics, tokens)]


def _indexes(names: Iterable[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(sorted(set(names) - {""}))}


def train(
    scorer: Scorer,
    context: Context,
    votes: Votes,
    settings: LearnerSettings,
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda _: None,
) -> float:
    """`[learner.reward] epochs` passes over the votes. Returns the mean loss of a vote in the last of them.

    Raises ThumbwheelError where a gradient is not finite.
    """
    chosen = settings.reward
    pair_weights, thumb_weights = reward.joint_weights(
        torch.tensor([pair.trust for pair in votes.pairs]),
        torch.tensor([thumb.trust for thumb in votes.thumbs]),
        chosen.weight_pairs,
        chosen.weight_thumbs,
    )
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=chosen.learning_rate, weight_decay=0.0)
    steps = chosen.epochs * math.ceil(len(votes) / chosen.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    ups = torch.tensor([thumb.up for thumb in votes.thumbs], dtype=torch.bool)
    scores = torch.zeros(len(votes.thumbs))
    better, worse = torch.zeros(2, len(votes.pairs))
    context.fit(votes.thumbs, scores, chosen.ridge)
    for epoch in range(chosen.epochs):
        loss = 0.0
        for indexes in torch.split(torch.randperm(len(votes), generator=generator), chosen.batch):
            thumbs, pairs = indexes[indexes < len(ups)], indexes[indexes >= len(ups)] - len(ups)
            part = Votes([votes.thumbs[i] for i in thumbs], [votes.pairs[i] for i in pairs])
            optimizer.zero_grad()
            seen = gradient(scorer, context, part, thumb_weights[thumbs], pair_weights[pairs], progress)
            loss += seen.loss * len(part) / len(votes)
            scores[thumbs], better[pairs], worse[pairs] = seen.scores, seen.chosen, seen.rejected
            norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), settings.max_grad_norm)
            if not norm.isfinite():
                raise ThumbwheelError(
                    "the gradient of the reward model is not finite: there is none now. Check the base model, and that "
                    "[learner.reward] learning_rate is not too large"
                )
            optimizer.step()
            schedule.step()
        figures = reward.diagnose(loss, better, worse, scores, context(votes.thumbs), ups)
        right = (figures.thumb_accuracy, "thumbs"), (figures.pair_accuracy, "pairs")
        logger.info(
            "reward model, epoch %d of %d: loss %.3f, scores spread %.2f, right about %s",
            *(epoch + 1, chosen.epochs, loss, figures.score_spread),
            " and ".join(f"{share:.0%} of {kind}" for share, kind in right if not math.isnan(share)),
        )
        context.fit(votes.thumbs, scores, chosen.ridge)
    return loss


@dataclass(frozen=True, slots=True)
class Seen:
    """Of a batch: the mean loss of a vote, the scores of thumbs' answers and of both sides of pairs."""

    loss: float
    scores: Tensor
    chosen: Tensor
    rejected: Tensor


def gradient(
    scorer: Scorer,
    context: Context,
    votes: Votes,
    thumb_weights: Tensor,
    pair_weights: Tensor,
    progress: Callable[[int], None] = lambda _: None,
) -> Seen:
    """Add the gradient of the mean loss of these votes to the scorer's, a bucket of rows in memory at a time."""
    thumbs, pairs, effects = votes.thumbs, votes.pairs, context(votes.thumbs)
    ups = torch.tensor([thumb.up for thumb in thumbs], dtype=torch.bool)
    scores = torch.zeros(len(thumbs))
    chosen, rejected = torch.zeros(2, len(pairs))
    loss = 0.0
    rows = [Row(thumb.prompt, thumb.completion) for thumb in thumbs]
    for bucket in buckets(rows):
        s = scorer([rows[i] for i in bucket])
        known = (each[bucket].to(s.device) for each in (effects, ups, thumb_weights))
        loss += _backward(reward.thumb_losses(s, *known).sum() / len(votes))
        scores[bucket] = s.detach().cpu()
        progress(len(bucket))
    # Both sides of a pair go together: a bucket of half as many tokens, by the longer of the two.
    longer = [Row(pair.prompt, max(pair.chosen, pair.rejected, key=len)) for pair in pairs]
    for bucket in buckets(longer, 512):
        sides = [Row(pairs[i].prompt, pairs[i].chosen) for i in bucket]
        sides += [Row(pairs[i].prompt, pairs[i].rejected) for i in bucket]
        w, l = scorer(sides).chunk(2)  # noqa: E741
        loss += _backward(reward.pair_losses(w, l, pair_weights[bucket].to(w.device)).sum() / len(votes))
        chosen[bucket], rejected[bucket] = w.detach().cpu(), l.detach().cpu()
        progress(len(sides))
    return Seen(loss, scores, chosen, rejected)


def _backward(loss: Tensor) -> float:
    torch.autograd.backward(loss)
    return loss.item()
