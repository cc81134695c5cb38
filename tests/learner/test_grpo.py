"""GRPO and GSPO against a reference in plain NumPy, finite differences and their own promises."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import grpo

LENGTHS = [5, 1, 3, 4]


def column(seed: int) -> tuple[list[Any], torch.Tensor]:
    """Log-probs of four answers, as rows and as a padded tensor with rubbish in the padding."""
    rows = [np.random.default_rng([seed, i]).normal(-1.5, 0.4, length) for i, length in enumerate(LENGTHS)]
    padded = np.full((len(rows), max(LENGTHS)), 0.77)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return rows, torch.tensor(padded)


MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
(POLICY, policy), (OLD, old), (REFERENCE, reference) = (column(seed) for seed in range(3))
ADVANTAGES = [1.3, -0.4, -1.1, 0.2]
advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def test_a_tokens_loss_is_the_papers() -> None:
    expected = []
    for rows, advantage in zip(zip(POLICY, OLD, REFERENCE, strict=True), ADVANTAGES, strict=True):
        for p, o, q in zip(*rows, strict=True):
            ratio, k3 = math.exp(p - o), math.exp(q - p) - (q - p) - 1
            expected.append(clipped(ratio, advantage, 0.1, 0.3) + 0.04 * ratio * k3)
    ours = grpo.token_losses(policy, old, advantages, MASK, 0.1, 0.3, reference, 0.04)
    assert ours[MASK].tolist() == pytest.approx(expected, rel=1e-9)
    assert not ours[~MASK].any()


def test_an_answers_loss_is_gspos() -> None:
    expected = [
        clipped(math.exp(np.mean(p - o)), advantage, 0.1, 0.3)
        for p, o, advantage in zip(POLICY, OLD, ADVANTAGES, strict=True)
    ]
    ours = grpo.sequence_losses(policy, old, advantages, MASK, 0.1, 0.3)
    assert ours.tolist() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=5), st.randoms())
def test_advantages_are_relative_to_the_group_in_whatever_order(rewards: list[list[float]], random: Any) -> None:
    rows = [(group, reward) for group, each in enumerate(rewards) for reward in each]
    random.shuffle(rows)
    expected = []
    for group, reward in rows:
        each = rewards[group]
        spread = np.std(each, ddof=1) if len(each) > 1 else 0.0
        expected.append((reward - np.mean(each)) / (spread + 1e-4))
    groups, values = zip(*rows, strict=True)
    ours = grpo.advantages(torch.tensor(values, dtype=torch.float64), torch.tensor(groups))
    assert ours.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_group_of_one_or_all_alike_teaches_nothing() -> None:
    ours = grpo.advantages(torch.tensor([5.0, 2.0, 2.0, 2.0]), torch.tensor([1, 0, 0, 0]))
    assert ours.tolist() == [0, 0, 0, 0]


def test_the_gradients_are_those_of_finite_differences() -> None:
    inputs = policy.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: grpo.token_losses(p, old, advantages, MASK), inputs)
    assert torch.autograd.gradcheck(
        lambda p: grpo.token_losses(p, old, advantages, MASK, 0.1, 0.3, reference, 0.3), inputs
    )
    assert torch.autograd.gradcheck(lambda p: grpo.sequence_losses(p, old, advantages, MASK, 0.1, 0.3), inputs)


def test_the_penaltys_gradient_is_that_of_the_kl() -> None:
    """Over a whole vocabulary, weighted as sampled from the old policy: exact, no sampling."""
    generator = torch.Generator().manual_seed(0)
    logits, theirs = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    now, other = logits.log_softmax(-1), theirs.log_softmax(-1)
    before = now.detach()
    none = torch.zeros(8, dtype=torch.float64)
    each = grpo.token_losses(now[:, None], before[:, None], none, torch.ones(8, 1).bool(), 1, 1, other[:, None], 1.0)
    (ours,) = torch.autograd.grad((before.exp() * each[:, 0]).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((now.exp() * (now - other)).sum(), logits)
    torch.testing.assert_close(ours, exact)


def test_on_policy_both_have_the_gradient_of_the_mean_log_prob_times_the_advantage() -> None:
    inputs = policy.clone().requires_grad_()
    (of_tokens,) = torch.autograd.grad(grpo.token_losses(inputs, policy, advantages, MASK).sum(), inputs)
    torch.testing.assert_close(of_tokens, torch.where(MASK, -advantages[:, None], 0.0).double())
    (of_answers,) = torch.autograd.grad(grpo.sequence_losses(inputs, policy, advantages, MASK).sum(), inputs)
    torch.testing.assert_close(of_answers, torch.where(MASK, -advantages[:, None] / MASK.sum(-1, keepdim=True), 0.0))


def test_a_row_has_the_same_loss_alone() -> None:
    both = grpo.sequence_losses(policy, old, advantages, MASK)
    tokens = grpo.token_losses(policy, old, advantages, MASK)
    for i, length in enumerate(LENGTHS):
        row = (slice(i, i + 1), slice(0, length))
        alone = policy[row], old[row], advantages[i : i + 1], MASK[row]
        assert grpo.sequence_losses(*alone).item() == pytest.approx(both[i].item())
        assert grpo.token_losses(*alone).sum().item() == pytest.approx(tokens[i].sum().item())


def test_nothing_in_the_padding_reaches_a_gradient() -> None:
    inputs = torch.where(MASK, policy, 900.0).requires_grad_()
    losses = grpo.token_losses(inputs, old, advantages, MASK, reference=reference, beta=0.1)
    both = losses.sum() + grpo.sequence_losses(inputs, old, advantages, MASK).sum()
    (gradient,) = torch.autograd.grad(both, inputs)
    assert gradient.isfinite().all()
    assert not gradient[~MASK].any()


def test_diagnostics_describe_the_batch() -> None:
    rewards, groups = torch.tensor([2.0, 0.0, 0.1, 0.1]).double(), torch.tensor([0, 0, 1, 1])
    relative = grpo.advantages(rewards, groups)
    ratios = [[math.exp(p - o) for p, o in zip(*rows, strict=True)] for rows in zip(POLICY, OLD, strict=True)]
    stopped = [r > 1.2 for r in ratios[0]] + [r < 0.8 for r in ratios[1]] + [False] * 7
    each = grpo.token_losses(policy, old, relative, MASK)
    seen = grpo.diagnose_tokens(each, policy, old, rewards, groups, MASK)
    assert seen.loss == pytest.approx(each.sum().item() / 13)
    assert seen.clipped == pytest.approx(np.mean(stopped))
    assert seen.clipped > 0
    assert seen.moved == pytest.approx(np.mean([r - 1 - math.log(r) for row in ratios for r in row]))
    assert seen.flat == 0.5

    answers = grpo.sequence_losses(policy, old, relative, MASK)
    of_answers = grpo.diagnose_sequences(answers, policy, old, rewards, groups, MASK)
    assert of_answers.loss == pytest.approx(answers.mean().item())
    means = [np.mean(p - o) for p, o in zip(POLICY, OLD, strict=True)]
    assert of_answers.clipped == ((means[0] > 0) + (means[1] < 0)) / 4
    assert (of_answers.moved, of_answers.flat) == (seen.moved, 0.5)
