"""Group-relative policy optimisation: an answer is good if it is better than others to the same prompt.

    A_i = (R_i − mean of the group) / (spread of the group + 1e-4)                    Shao et al., arXiv 2402.03300

GRPO clips token by token (equation 3 there):

    L_it = −min(ρ_it A_i, clip(ρ_it, 1 − ε_low, 1 + ε_high) A_i) + β ρ_it k3_it,   ρ_it = πθ(y_it) / πold(y_it)
    k3   = πref / πθ − log(πref / πθ) − 1                                             (equation 4)

and GSPO answer by answer (Zheng et al., arXiv 2507.18071, equations 5 to 7), which fits a reward that is given to whole
answers, and does not drift with the noise of single tokens:

    L_i  = −min(s_i A_i, clip(s_i, 1 − ε_low, 1 + ε_high) A_i),   s_i = exp(mean over tokens of log ρ_it)

Tensors are rows × tokens, padded on the right, with a mask that is True on an answer's tokens; log-probs are in nats.

GRPO's batch loss is Σ L_it over the number of the batch's tokens, as TRL 1.16 does by default (its `dapo`, Yu et al.,
arXiv 2503.14476, section 3.3); the paper takes the mean of each answer first, so that a token weighs less in a long
answer. GSPO's is the mean over answers. Defaults are TRL's too: ε 0.2 on both sides, β 0 (no KL term, and no reference
needed). The factor ρ before k3 is not in the first paper: without it the term's gradient is that of another KL (Tang
and Munos, arXiv 2506.09477), with it that of KL(πθ ‖ πref) (DeepSeek-V3.2, arXiv 2512.02556; TRL's default too). The
spread is a sample's (n − 1), as in TRL; a group that is all alike, or of one, teaches nothing. An answer has at least
one token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.algorithm import Algorithm, Figures, Models, Needs, figures, thumbs_of
from learner.batch import Batch, Plan
from learner.drawn import draw
from learner.examples import Examples

CLIP = 0.2
"""How far a token's ratio may move before it stops counting."""

SEQUENCE_LOW, SEQUENCE_HIGH = 3e-4, 4e-4
"""How far an answer's ratio may move down and up (arXiv 2507.18071, section 5.1)."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Of one batch. `moved` is KL(old ‖ policy) in nats a token; `clipped` is a share of tokens (GSPO: of answers);
    `flat` is the share of answers in groups whose rewards are all alike."""

    loss: float
    moved: float
    clipped: float
    flat: float


def advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """A of each answer of a whole batch, from its reward and the number of its group (0, 1, …)."""
    size, mean, spread = _groups(rewards, groups)
    relative = (rewards - mean) / (spread + 1e-4)
    return torch.where(size > 1, relative, 0.0)


def token_losses(
    policy: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float = CLIP,
    high: float = CLIP,
    reference: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """GRPO's loss of each token, zero outside of the mask. Differentiable in `policy`; advantages are one a row."""
    ratios = torch.where(mask, policy - old, 0.0).exp()
    losses = _clip(ratios, advantages[:, None], low, high)
    if reference is not None:
        below = torch.where(mask, reference - policy, 0.0)
        losses = losses + beta * ratios * (below.expm1() - below)
    return torch.where(mask, losses, 0.0)


def sequence_losses(
    policy: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float = SEQUENCE_LOW,
    high: float = SEQUENCE_HIGH,
) -> Tensor:
    """GSPO's loss of each answer. Differentiable in `policy`; advantages are one a row."""
    return _clip(_sequence_ratios(policy, old, mask), advantages, low, high)


def diagnose_tokens(
    each: Tensor,
    policy: Tensor,
    old: Tensor,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor,
    low: float = CLIP,
    high: float = CLIP,
) -> Diagnostics:
    """What a whole batch looks like to GRPO, from the losses of `each` token."""
    ratios = torch.where(mask, policy - old, 0.0).exp()
    stopped = _stopped(ratios, advantages(rewards, groups)[:, None], low, high)
    return _diagnose(each[mask], stopped[mask], policy, old, rewards, groups, mask)


def diagnose_sequences(
    each: Tensor,
    policy: Tensor,
    old: Tensor,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor,
    low: float = SEQUENCE_LOW,
    high: float = SEQUENCE_HIGH,
) -> Diagnostics:
    """What a whole batch looks like to GSPO, from the losses of `each` answer."""
    stopped = _stopped(_sequence_ratios(policy, old, mask), advantages(rewards, groups), low, high)
    return _diagnose(each, stopped, policy, old, rewards, groups, mask)


def _groups(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Size, mean and spread of each answer's group."""
    number = int(groups.max()) + 1 if len(groups) else 0
    zeros = rewards.new_zeros(number)
    size = zeros.index_add(0, groups, torch.ones_like(rewards))
    mean = zeros.index_add(0, groups, rewards) / size
    square = zeros.index_add(0, groups, (rewards - mean[groups]).square())
    spread = (square / (size - 1).clamp(min=1)).sqrt()
    return size[groups], mean[groups], spread[groups]


def _clip(ratios: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)


def _stopped(ratios: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """What the clip keeps from moving further."""
    return ((ratios > 1 + high) & (advantages > 0)) | ((ratios < 1 - low) & (advantages < 0))


def _sequence_ratios(policy: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return (torch.where(mask, policy - old, 0.0).sum(-1) / mask.sum(-1)).exp()


def _diagnose(
    each: Tensor, stopped: Tensor, policy: Tensor, old: Tensor, rewards: Tensor, groups: Tensor, mask: Tensor
) -> Diagnostics:
    change = (policy - old)[mask]
    return Diagnostics(
        loss=each.mean().item(),
        moved=(change.expm1() - change).mean().item(),
        clipped=stopped.float().mean().item(),
        flat=(_groups(rewards, groups)[2] < 1e-6).float().mean().item(),
    )


class GRPO(Algorithm):
    """Without a KL term: the budget holds the policy. An answer that was cut off loses `unfinished_penalty`."""

    needs = Needs(fresh=True)

    def plan(self, examples: Examples, models: Models) -> Plan:
        drawn = draw(thumbs_of(examples), models, self.settings.ppo.unfinished_penalty)
        groups = torch.tensor(drawn.groups)
        facts = {
            "old": drawn.old,
            "rewards": drawn.rewards,
            "groups": groups,
            "advantages": advantages(drawn.rewards, groups),
        }
        return Plan(drawn.rows, drawn.groups, facts, units=drawn.units)

    def __call__(self, batch: Batch) -> tuple[Tensor, Figures]:
        each = token_losses(batch.policy, batch["old"], batch["advantages"], batch.mask)
        read = (batch.policy.detach(), batch["old"], batch["rewards"], batch["groups"], batch.mask)
        return each.sum() / batch.tokens, _figures(batch, diagnose_tokens(each.detach(), *read))


class GSPO(GRPO):
    """GRPO with one ratio an answer."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Figures]:
        each = sequence_losses(batch.policy, batch["old"], batch["advantages"], batch.mask)
        read = (batch.policy.detach(), batch["old"], batch["rewards"], batch["groups"], batch.mask)
        return each.sum() / batch.size, _figures(batch, diagnose_sequences(each.detach(), *read))


def _figures(batch: Batch, diagnostics: Diagnostics) -> Figures:
    return figures(diagnostics) | {"reward": batch["rewards"].mean().item()}
