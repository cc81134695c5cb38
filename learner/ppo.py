"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347) as it is used on language models.

Tensors are rows × tokens, padded on the right, with a mask that is True on an answer's tokens. Log-probs are in nats,
rewards in whatever unit the score has. Per-token losses are zero outside of the mask; a batch's loss is their sum over
the number of its tokens. An answer has at least one.

Fresh answers (Ziegler et al., arXiv 1909.08593, section 2; Ouyang et al., arXiv 2203.02155, section 3.5):

    r_t = −β (log π(y_t) − log πref(y_t)) + [t last] (score − penalty if unfinished)      1909.08593, equation 2
    δ_t = r_t + γ V_{t+1} − V_t,   Â_t = Σ_l (γλ)^l δ_{t+l}                               1506.02438, equation 16
    R_t = Â_t + V_t
    L   = −min(ρ_t Â_t, clip(ρ_t, 1 ± ε) Â_t),   ρ_t = πθ(y_t) / πold(y_t)                1707.06347, equation 7
    L_V = ½ max((V − R)², (Vold + clip(V − Vold, ±ε_V) − R)²)
    β  ← β (1 + clip(KL / target − 1, ±0.2) n / horizon)                                  1909.08593, section 2.2

The KL is in the reward, by its k1 estimate and without a gradient: as a loss term, k1's gradient is zero on average and
k3's is that of another KL (Tang and Munos, arXiv 2506.09477). An answer ends where it is cut off: V past the last token
is zero. Advantages are whitened over a whole batch; variances are those of the population, not of a sample.

Logged answers come from older policies μ, as recorded when they were sampled. Decoupled PPO (Hilton et al., arXiv
2110.00641, section 3; Fu et al., arXiv 2505.24298, section 5.2) clips against a recent policy πprox and corrects for μ:

    L = −w_t min(ρ_t Â_t, clip(ρ_t, 1 ± ε) Â_t),   ρ_t = πθ / πprox,   w_t = min(πprox / μ, C), without a gradient

Rows that are too old (`fresh`) or whose geometric mean of πprox / μ says that something else sampled them (`near`) are
left out, and an update is skipped whose weights are worth too few samples (`enough`). A thumb is a reward of
+1/(2p̂) or −1/(2(1 − p̂)) with p̂ the share of ups: on average zero, and each class pulls as hard as the other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from learner.algorithm import Algorithm, Figures, Models, Needs, Unusable, figures, thumbs_of
from learner.batch import Batch, Plan, answer_mask, of_one_prompt
from learner.drawn import draw
from learner.examples import Examples, Thumb
from learner.logprobs import Row
from thumbwheel.settings import LearnerSettings
from thumbwheel.store import number

CLIP = 0.2
"""How far a ratio, or a value, may move before it stops counting."""

CAP = 2.0
"""The largest weight of a logged token."""

EFFECTIVE = 0.3
"""An update on logged tokens needs weights that are worth this share of as many fresh ones."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Of one batch of fresh answers. `moved` is KL(old ‖ policy) in nats a token; shares are of tokens.

    `explained` is the share of the returns' variance that the values foretold: 1 at best, 0 for a constant.
    """

    policy_loss: float
    value_loss: float
    moved: float
    clipped: float
    explained: float


@dataclass(frozen=True, slots=True)
class LoggedDiagnostics:
    """Of one batch of logged answers. `weight` is the mean of w, `effective` what `effective_share` says."""

    policy_loss: float
    moved: float
    clipped: float
    weight: float
    effective: float


@dataclass(frozen=True, slots=True)
class Controller:
    """β, and the KL to the reference that it steers towards, in nats an answer."""

    beta: float
    target: float
    horizon: float

    def update(self, kl: float, answers: int) -> "Controller":
        """β after so many answers with this mean KL: it rises when the policy strays, by at most a fifth a horizon."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, beta=self.beta * (1 + error * answers / self.horizon))


@torch.no_grad()
def token_rewards(
    scores: Tensor, policy: Tensor, reference: Tensor, mask: Tensor, beta: float, ended: Tensor, penalty: float
) -> Tensor:
    """r_t of whole answers: scores (one a row), log-probs of the policy that sampled them, and which rows `ended`.

    `penalty` is taken off the score of an answer that was cut off before its end token. Without a gradient.
    """
    rewards = torch.where(mask, -beta * (policy - reference), 0.0)
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(-1, last, (scores - penalty * ~ended).to(rewards)[:, None])


@torch.no_grad()
def advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Â and R of each token, by generalised advantage estimation. Without a gradient."""
    values = torch.where(mask, values, 0.0)
    ahead, after = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    estimates = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * after - values[:, t]
        ahead = torch.where(mask[:, t], delta + gamma * lam * ahead, 0.0)
        estimates[:, t], after = ahead, values[:, t]
    return estimates, estimates + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of a whole batch; all zero where they are alike."""
    kept = values[mask]
    scaled = (values - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt()
    return torch.where(mask, scaled, 0.0)


def policy_losses(policy: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = CLIP) -> Tensor:
    """L of each token. Differentiable in `policy`; `old` are the log-probs that the update started from."""
    ratios = torch.where(mask, policy - old, 0.0).exp()
    worst = torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)
    return torch.where(mask, -worst, 0.0)


def value_losses(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float = CLIP) -> Tensor:
    """L_V of each token. Differentiable in `values`; `old` are the values that the advantages came from."""
    clipped = old + (values - old).clamp(-clip, clip)
    return torch.where(mask, 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()), 0.0)


def moved(policy: Tensor, old: Tensor, mask: Tensor) -> float:
    """KL(old ‖ policy) in nats a token over answers that `old` sampled: the k3 estimate, never negative."""
    change = (policy - old)[mask]
    return (change.expm1() - change).mean().item()


def stop_early(policy: Tensor, old: Tensor, mask: Tensor, target: float) -> bool:
    """Whether a batch has been gone over often enough: the policy moved more than 1.5 times `target` nats a token."""
    return not moved(policy, old, mask) <= 1.5 * target


def diagnose(
    policy: Tensor,
    old: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = CLIP,
) -> Diagnostics:
    """What a whole batch of fresh answers looks like, losses as means over tokens."""
    spread = returns[mask].var(correction=0)
    return Diagnostics(
        policy_loss=policy_losses(policy, old, advantages, mask, clip)[mask].mean().item(),
        value_loss=value_losses(values, old_values, returns, mask, clip)[mask].mean().item(),
        moved=moved(policy, old, mask),
        clipped=_clipped(policy, old, advantages, mask, clip),
        explained=(1 - (returns - old_values)[mask].var(correction=0) / spread).item() if spread > 0 else math.nan,
    )


def fresh(lags: Tensor, most: int = 4) -> Tensor:
    """Which rows were sampled at most so many versions ago."""
    return lags <= most


@torch.no_grad()
def near(proximal: Tensor, behaviour: Tensor, mask: Tensor, low: float = 0.8, high: float = 1.25) -> Tensor:
    """Which rows have a geometric mean of πprox / μ between `low` and `high`; a starting value, not a tuned one."""
    total = torch.where(mask, proximal - behaviour, 0.0).sum(-1)
    ratio = (total / mask.sum(-1)).exp()
    return (ratio >= low) & (ratio <= high)


@torch.no_grad()
def behaviour_weights(proximal: Tensor, behaviour: Tensor, mask: Tensor, cap: float = CAP) -> Tensor:
    """w of each token; zero outside of the mask. Without a gradient."""
    return torch.where(mask, (proximal - behaviour).exp().clamp(max=cap), 0.0)


def effective_share(weights: Tensor, mask: Tensor) -> float:
    """(Σw)² / Σw² a token, at most 1: what share of as many fresh tokens these are worth (Kish's sample size).

    Of the weights as they are used, cut off at `cap`: a few outliers do not cost a batch, many unlikely tokens do.
    """
    used = weights[mask]
    return (used.sum().square() / used.square().sum() / len(used)).nan_to_num(0.0).item()


def enough(weights: Tensor, mask: Tensor, share: float = EFFECTIVE) -> bool:
    """Whether a whole batch is worth an update."""
    return bool(mask.any()) and effective_share(weights, mask) >= share


def up_rate(ups: Tensor, trust: Tensor, least: float = 0.05) -> float:
    """p̂ of a whole batch by trust, no nearer to 0 or 1 than `least`; ½ where nobody is trusted."""
    total = trust.sum().item()
    share = (trust * ups).sum().item() / total if total > 0 else 0.5
    return min(max(share, least), 1 - least)


def thumb_rewards(ups: Tensor, rate: float) -> Tensor:
    """+1/(2p̂) for an up, −1/(2(1 − p̂)) for a down."""
    return torch.where(ups, 0.5 / rate, -0.5 / (1 - rate))


def decoupled_losses(
    policy: Tensor, proximal: Tensor, advantages: Tensor, weights: Tensor, mask: Tensor, clip: float = CLIP
) -> Tensor:
    """L of each logged token. Differentiable in `policy` alone; `weights` are those of `behaviour_weights`."""
    return weights.detach() * policy_losses(policy, proximal.detach(), advantages, mask, clip)


def diagnose_logged(
    policy: Tensor, proximal: Tensor, advantages: Tensor, weights: Tensor, mask: Tensor, clip: float = CLIP
) -> LoggedDiagnostics:
    """What a whole batch of logged answers looks like, the loss as its mean over tokens."""
    return LoggedDiagnostics(
        policy_loss=decoupled_losses(policy, proximal, advantages, weights, mask, clip)[mask].mean().item(),
        moved=moved(policy, proximal, mask),
        clipped=_clipped(policy, proximal, advantages, mask, clip),
        weight=weights[mask].mean().item(),
        effective=effective_share(weights, mask),
    )


def _clipped(policy: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> float:
    """The share of tokens that the clip keeps from moving further."""
    ratios = torch.where(mask, policy - old, 0.0).exp()
    beyond = ((ratios > 1 + clip) & (advantages > 0)) | ((ratios < 1 - clip) & (advantages < 0))
    return beyond[mask].float().mean().item()


class PPO(Algorithm):
    """On fresh answers. The value head reads the policy's hidden states and sends no gradient into them."""

    needs = Needs(fresh=True)

    def __init__(self, settings: LearnerSettings, width: int) -> None:
        super().__init__(settings, width)
        chosen = settings.ppo
        self._controller = Controller(chosen.kl_coefficient, chosen.kl_target, chosen.kl_horizon)
        self.head = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def plan(self, examples: Examples, models: Models) -> Plan:
        drawn = draw(thumbs_of(examples), models, self.settings.ppo.unfinished_penalty)
        assert drawn.values is not None
        old, values, mask = drawn.old, drawn.values, answer_mask(drawn.rows).to(drawn.old.device)
        reference = models.reference(drawn.rows, keep=False)
        # The penalty is in the rewards already.
        rewards = token_rewards(drawn.rewards, old, reference, mask, self._controller.beta, drawn.ended, 0.0)
        estimates, returns = advantages(rewards, values, mask)
        facts = {
            "old": old,
            "reference": reference,
            "values": values,
            "rewards": drawn.rewards,
            "advantages": whiten(estimates, mask),
            "returns": returns,
        }
        return Plan(drawn.rows, drawn.groups, facts, {"beta": self._controller.beta}, drawn.units)

    def __call__(self, batch: Batch) -> tuple[Tensor, Figures]:
        assert batch.values is not None
        old, estimates, mask = batch["old"], batch["advantages"], batch.mask
        policy = policy_losses(batch.policy, old, estimates, mask)
        value = value_losses(batch.values, batch["values"], batch["returns"], mask)
        seen = diagnose(
            batch.policy.detach(), old, estimates, batch.values.detach(), batch["values"], batch["returns"], mask
        )
        more = {
            "loss": seen.policy_loss,
            "reward": batch["rewards"].mean().item(),
            "kl": (old - batch["reference"]).sum(-1).mean().item(),
            "beta": batch.numbers["beta"],
        }
        return (policy.sum() + value.sum()) / batch.tokens, figures(seen) | more

    def enough(self, batch: Batch) -> bool:
        return stop_early(batch.policy, batch["old"], batch.mask, self.settings.ppo.stop_kl)

    def after(self, whole: Batch) -> None:
        kl = (whole["old"] - whole["reference"]).sum(-1).mean().item()
        self._controller = self._controller.update(kl, whole.size)

    def state(self) -> dict[str, Any]:
        return {"beta": self._controller.beta}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._controller = replace(self._controller, beta=state["beta"])


class LoggedPPO(Algorithm):
    """On logged answers: one step from where the policy is, so that this is the recent policy."""

    needs = Needs(logprobs=True)

    def plan(self, examples: Examples, models: Models) -> Plan:
        thumbs = thumbs_of(examples)
        chosen = self.settings.ppo
        lags = torch.tensor([number(models.parent) - number(thumb.version) for thumb in thumbs])
        young = fresh(lags, chosen.max_lag)
        recorded = torch.tensor([bool(thumb.behaviour) for thumb in thumbs])
        left_out = {
            i: f"its answer is of {thumbs[i].version}, more than {chosen.max_lag} versions before {models.parent}"
            for i in _where(~young)
        } | dict.fromkeys(_where(~recorded), "the log-probs of its answer were not kept")
        thumbs, owners = _kept(thumbs, list(range(len(thumbs))), young & recorded)
        _both_classes(thumbs, left_out)
        rows = [Row(thumb.prompt, thumb.completion) for thumb in thumbs]
        proximal, _ = models.policy(rows)
        mask = answer_mask(rows).to(proximal.device)
        behaviour = _padded([thumb.behaviour for thumb in thumbs], proximal)
        like = near(proximal, behaviour, mask)
        left_out |= {
            owners[i]: "the policy gives its tokens other probabilities than they were recorded with"
            for i in _where(~like)
        }
        keep = _where(like)
        thumbs, owners = _kept(thumbs, owners, like)
        _both_classes(thumbs, left_out)
        rows, proximal, behaviour, mask = [rows[i] for i in keep], proximal[keep], behaviour[keep], mask[keep]
        weights = behaviour_weights(proximal, behaviour, mask)
        if not enough(weights, mask):
            share = effective_share(weights, mask)
            why = f"these answers are worth {share:.0%} of as many fresh ones, and it takes {EFFECTIVE:.0%}"
            raise Unusable(why, left_out | dict.fromkeys(owners, why))
        trust = torch.tensor([thumb.trust for thumb in thumbs]).to(proximal)
        ups = torch.tensor([thumb.up for thumb in thumbs], device=proximal.device)
        rewards = thumb_rewards(ups, up_rate(ups, trust)).to(proximal) * trust
        ended = torch.ones(len(rows), dtype=torch.bool, device=proximal.device)  # a thumb was given for it as it is
        each = token_rewards(rewards, proximal, models.reference(rows), mask, chosen.kl_coefficient, ended, 0.0)
        estimates, _ = advantages(each, torch.zeros_like(each), mask, lam=1.0)
        facts = {"proximal": proximal, "advantages": estimates, "weights": weights}
        return Plan(rows, owners, facts, units=of_one_prompt(rows), left_out=left_out)

    def __call__(self, batch: Batch) -> tuple[Tensor, Figures]:
        known = (batch["proximal"], batch["advantages"], batch["weights"], batch.mask)
        each = decoupled_losses(batch.policy, *known)
        seen = diagnose_logged(batch.policy.detach(), *known)
        return each.sum() / batch.tokens, figures(seen) | {"loss": seen.policy_loss}


def _where(which: Tensor) -> list[int]:
    return [int(i) for i in which.nonzero().squeeze(-1)]


def _kept(thumbs: Sequence[Thumb], owners: Sequence[int], which: Tensor) -> tuple[list[Thumb], list[int]]:
    return [thumbs[i] for i in _where(which)], [owners[i] for i in _where(which)]


def _both_classes(thumbs: Sequence[Thumb], left_out: Mapping[int, str]) -> None:
    if len({thumb.up for thumb in thumbs}) < 2:
        raise Unusable("the answers that are recent and near enough to the policy have not both thumbs", left_out)


def _padded(values: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    rows = [torch.tensor(row, dtype=like.dtype, device=like.device) for row in values]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
