"""The BCO loss against an oracle, finite differences and its own promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import bco, kto

rows = st.lists(
    st.tuples(st.floats(-200, 0), st.floats(-200, 0), st.booleans(), st.floats(0.1, 5)), min_size=1, max_size=9
)


@settings(max_examples=50)
@given(rows, st.floats(-3, 3))
def test_the_loss_is_the_papers(rows: list[tuple[float, float, bool, float]], delta: float) -> None:
    policy, reference, ups, weights = (np.array(column) for column in zip(*rows, strict=True))
    rewards = 0.1 * (policy - reference)
    batch = torch.tensor(policy), torch.tensor(reference), torch.tensor(ups), torch.tensor(weights)
    expected = np.where(ups, np.logaddexp(0, delta - rewards), np.logaddexp(0, rewards - delta)) * weights
    ours = bco.losses(*batch, 0.1, delta)
    assert ours.tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)


@settings(max_examples=50)
@given(rows, st.floats(-3, 3))
def test_a_pairs_loss_is_never_below_that_of_dpo(rows: list[tuple[float, float, bool, float]], delta: float) -> None:
    """Theorem 1, for any δ: the loss of a chosen up and a rejected down bounds that of the pair."""
    first, second = (torch.tensor(column, dtype=torch.float64) for column in list(zip(*rows, strict=True))[:2])
    ones, zeros = torch.ones(len(rows)), torch.zeros(len(rows))
    up = bco.losses(first, zeros, ones.bool(), ones, 0.1, delta)
    down = bco.losses(second, zeros, zeros.bool(), ones, 0.1, delta)
    assert (up + down >= -torch.nn.functional.logsigmoid(0.1 * (first - second)) - 1e-9).all()


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference, weights = 8 * torch.randn(3, 7, generator=generator, dtype=torch.float64)
    ups = torch.tensor([True, False, True, False, False, True, False])
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: bco.losses(p, reference, ups, weights.abs(), 0.3, 0.7), policy)


def test_a_row_on_the_wrong_side_never_stops_teaching() -> None:
    policy = torch.tensor([-500.0, 500.0], requires_grad=True)
    ups, weights = torch.tensor([True, False]), torch.ones(2)
    loss = bco.losses(policy, torch.zeros(2), ups, weights, 0.1, 0.0).sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient.tolist() == pytest.approx([-0.1, 0.1])


def test_the_midpoint_is_between_the_classes_whatever_their_sizes() -> None:
    policy, ups = torch.tensor([4.0] + [-2.0] * 9), torch.tensor([True] + [False] * 9)
    weights = torch.tensor(kto.class_weights(ups.tolist(), 1, 1.3))
    assert bco.midpoint(policy, torch.zeros(10), ups, weights, 0.1) == pytest.approx(0.1)


def test_the_midpoint_counts_trust() -> None:
    policy, ups = torch.tensor([4.0, 100.0, -2.0]), torch.tensor([True, True, False])
    assert bco.midpoint(policy, torch.zeros(3), ups, torch.tensor([1.0, 0.0, 2.0]), 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ups", "weights"), [([True] * 2, [1.0] * 2), ([False] * 2, [1.0] * 2), ([True, False], [1, 0])]
)
def test_one_class_alone_has_no_midpoint(ups: list[bool], weights: list[float]) -> None:
    assert bco.midpoint(torch.ones(2), torch.zeros(2), torch.tensor(ups), torch.tensor(weights), 0.1) is None


def test_diagnostics_describe_the_batch() -> None:
    policy, ups = torch.tensor([10.0, 60.0, -1.0, 40.0]), torch.tensor([True, True, False, False])
    seen = bco.diagnose(policy, torch.zeros(4), ups, torch.ones(4), 0.1, 2.0)
    assert (seen.reward_up, seen.reward_down, seen.margin) == pytest.approx((3.5, 1.95, 1.55))
    assert seen.accuracy == 0.5  # 1 and 4 are on the wrong side of 2
    assert seen.settled == 0.25  # σ(−(6 − 2)) alone is below a tenth
    assert seen.delta == 2
    expected = np.mean([math.log1p(math.exp(x)) for x in (1, -4, -2.1, 2)])
    assert seen.loss == pytest.approx(expected, rel=1e-6)
