"""Direct preference optimisation from pairs: a correction over its original, a preferred sibling, an up over a down.

With r = log πθ(y|x) − log πref(y|x) in nats, of the chosen answer r_w, of the rejected one r_l, and Δ = r_w − r_l:

    sigmoid   −log σ(βΔ)                                                 Rafailov et al., arXiv 2305.18290, equation 7
    robust    (−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε)             Chowdhury et al., arXiv 2403.00409, section 3
    ipo       (r_w/|y_w| − r_l/|y_l| − 1/(2β))²                          Azar et al., arXiv 2310.12036, equation 17

The names are those of TRL 1.16. `robust` takes labels to be flipped with probability ε and is, on average over the
flips, the sigmoid loss of the true labels; it can be negative. It is not cDPO, −(1 − ε) log σ(βΔ) − ε log σ(−βΔ), which
draws margins towards a finite one: TRL called that `sigmoid` with label smoothing, and has it no longer.

`ipo` follows TRL and not the paper in one thing: r is divided by the answer's number of tokens, so that one β fits
answers of any length. β is then τ of the paper per nat a token: the margin asked for is 1/(2β) nats a token.

Known to go wrong: Δ can grow while both answers become less likely; `falling` says how often that happens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from learner.algorithm import Algorithm, Figures, Models, Needs, figures, pairs_of
from learner.batch import Batch, Plan
from learner.examples import Examples
from learner.logprobs import Row

SETTLED = 0.1
"""A pair is settled when σ(−βΔ), by which the sigmoid loss pulls, is below this."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Of one batch. Rewards are β r; `accuracy` is the share of pairs with Δ > 0, `falling` of those with r_w < 0."""

    loss: float
    reward_chosen: float
    reward_rejected: float
    accuracy: float
    settled: float
    falling: float

    @property
    def margin(self) -> float:
        return self.reward_chosen - self.reward_rejected


def pair_weights(trust: Tensor) -> Tensor:
    """The weight of each pair of a whole batch, in proportion to its trust; they sum to the number of pairs."""
    total = trust.sum()
    return trust / total * len(trust) if total > 0 else torch.zeros_like(trust)


def sigmoid(chosen: Tensor, rejected: Tensor, weights: Tensor, beta: float) -> Tensor:
    """The loss of each pair from r_w and r_l, in nats."""
    return -weights * functional.logsigmoid(beta * (chosen - rejected))


def robust(chosen: Tensor, rejected: Tensor, weights: Tensor, beta: float, flipped: float) -> Tensor:
    """The loss of each pair from r_w and r_l, in nats; `flipped` is ε, at least 0 and below ½ (else ValueError)."""
    if not 0 <= flipped < 0.5:
        raise ValueError(f"labels that are wrong with probability {flipped} say nothing: it has to be below 0.5")
    logits = beta * (chosen - rejected)
    kept, turned = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    return weights * (flipped * turned - (1 - flipped) * kept) / (1 - 2 * flipped)


def ipo(
    chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, weights: Tensor, beta: float
) -> Tensor:
    """The loss of each pair from r_w and r_l, in nats, and the numbers of tokens |y_w| and |y_l|."""
    return weights * (chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * beta)) ** 2


def diagnose(each: Tensor, chosen: Tensor, rejected: Tensor, beta: float) -> Diagnostics:
    """What a whole batch looks like, from the losses of `each` pair and its r_w and r_l."""
    margins = chosen - rejected
    return Diagnostics(
        loss=each.mean().item(),
        reward_chosen=beta * chosen.mean().item(),
        reward_rejected=beta * rejected.mean().item(),
        accuracy=(margins > 0).float().mean().item(),
        settled=(torch.sigmoid(-beta * margins) < SETTLED).float().mean().item(),
        falling=(chosen < 0).float().mean().item(),
    )


class DPO(Algorithm):
    """The loss is that of `[learner] dpo_loss`."""

    needs = Needs(pairs=True)

    def plan(self, examples: Examples, models: Models) -> Plan:
        pairs = pairs_of(examples)
        rows = [Row(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
        weights = pair_weights(torch.tensor([pair.trust for pair in pairs]))
        return Plan(
            rows,
            [i for i in range(len(pairs)) for _ in range(2)],
            {
                "reference": models.reference(rows),
                "chosen": torch.tensor([True, False] * len(pairs)),
                "weights": weights.repeat_interleave(2),
            },
            units=[[2 * i, 2 * i + 1] for i in range(len(pairs))],
        )

    def __call__(self, batch: Batch) -> tuple[Tensor, Figures]:
        better, beta = batch["chosen"], self.settings.beta
        gained = batch.policy.sum(-1) - batch["reference"].sum(-1)
        chosen, rejected, weights = gained[better], gained[~better], batch["weights"][better]
        match self.settings.dpo_loss:
            case "sigmoid":
                each = sigmoid(chosen, rejected, weights, beta)
            case "robust":
                each = robust(chosen, rejected, weights, beta, self.settings.label_noise)
            case "ipo":
                tokens = batch.mask.sum(-1)
                each = ipo(chosen, rejected, tokens[better], tokens[~better], weights, beta)
        seen = diagnose(each.detach(), chosen.detach(), rejected.detach(), beta)
        return each.sum() / (batch.size / 2), figures(seen)
