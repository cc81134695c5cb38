"""The DPO losses against oracles, finite differences and their own promises."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner import dpo

pairs = st.lists(
    st.tuples(st.floats(-90, 90), st.floats(-90, 90), st.integers(1, 50), st.integers(1, 50), st.floats(0.1, 5)),
    min_size=1,
    max_size=9,
)


def columns(pairs: list[tuple[float, float, int, int, float]]) -> list[np.ndarray]:
    return [np.array(column, dtype=float) for column in zip(*pairs, strict=True)]


@settings(max_examples=50)
@given(pairs, st.floats(0, 0.45))
def test_the_losses_are_the_papers(pairs: list[tuple[float, float, int, int, float]], flipped: float) -> None:
    chosen, rejected, chosen_tokens, rejected_tokens, weights = columns(pairs)
    better, worse, *tokens, trust = map(torch.tensor, (chosen, rejected, chosen_tokens, rejected_tokens, weights))
    margin = 0.1 * (chosen - rejected)
    expected = {
        "sigmoid": np.logaddexp(0, -margin),
        "robust": ((1 - flipped) * np.logaddexp(0, -margin) - flipped * np.logaddexp(0, margin)) / (1 - 2 * flipped),
        "ipo": (chosen / chosen_tokens - rejected / rejected_tokens - 1 / 0.2) ** 2,
    }
    ours = {
        "sigmoid": dpo.sigmoid(better, worse, trust, 0.1),
        "robust": dpo.robust(better, worse, trust, 0.1, flipped),
        "ipo": dpo.ipo(better, worse, tokens[0], tokens[1], trust, 0.1),
    }
    for kind, each in ours.items():
        assert each.tolist() == pytest.approx((weights * expected[kind]).tolist(), rel=1e-9, abs=1e-9), kind


@pytest.mark.parametrize(
    "loss",
    [
        partial(dpo.sigmoid, weights=torch.tensor([0.5, 1, 2, 1]), beta=0.3),
        partial(dpo.robust, weights=torch.tensor([0.5, 1, 2, 1]), beta=0.3, flipped=0.2),
        partial(
            dpo.ipo,
            chosen_tokens=torch.tensor([1, 2, 3, 4]),
            rejected_tokens=torch.tensor([4, 1, 2, 5]),
            weights=torch.tensor([0.5, 1, 2, 1]),
            beta=0.3,
        ),
    ],
)
def test_the_gradient_is_that_of_finite_differences(loss: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = 5 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


@settings(max_examples=50)
@given(st.floats(-5, 5), st.floats(0, 0.45))
def test_robust_is_on_average_the_loss_of_the_true_labels(margin: float, flipped: float) -> None:
    better, worse = torch.tensor([margin], dtype=torch.float64), torch.zeros(1)
    noisy = (1 - flipped) * dpo.robust(better, worse, torch.ones(1), 1.0, flipped)
    noisy += flipped * dpo.robust(worse, better, torch.ones(1), 1.0, flipped)
    assert noisy.item() == pytest.approx(dpo.sigmoid(better, worse, torch.ones(1), 1.0).item(), abs=1e-9)


def test_robust_without_flips_is_sigmoid() -> None:
    better, worse, weights = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dpo.robust(better, worse, weights, 0.1, 0.0), dpo.sigmoid(better, worse, weights, 0.1))


@pytest.mark.parametrize("flipped", [0.5, 0.9, -0.1, math.nan])
def test_labels_without_information_are_refused(flipped: float) -> None:
    with pytest.raises(ValueError, match="say nothing"):
        dpo.robust(torch.ones(1), torch.ones(1), torch.ones(1), 0.1, flipped)


def test_ipo_stops_at_its_margin_a_token() -> None:
    chosen = torch.tensor([20.0], requires_grad=True)  # 2 nats a token above, −0.5 below: 1/(2 · 0.2)
    loss = dpo.ipo(chosen, torch.tensor([-2.0]), torch.tensor([10]), torch.tensor([4]), torch.ones(1), 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    assert (loss.item(), gradient.item()) == (0, 0)


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_weights_follow_trust_and_sum_to_the_pairs(trust: list[float]) -> None:
    given = torch.tensor(trust, dtype=torch.float64)
    weights = dpo.pair_weights(given)
    if given.sum() > 0:
        assert weights.sum().item() == pytest.approx(len(trust))
        torch.testing.assert_close(weights * given.sum(), given * len(trust))
    else:
        assert not weights.any()


def test_diagnostics_describe_the_batch() -> None:
    chosen, rejected = torch.tensor([10.0, -20.0, -1.0, 0.5]), torch.tensor([-20.0, -40.0, 2.0, 0.0])
    each = dpo.sigmoid(chosen, rejected, torch.ones(4), 0.1)
    seen = dpo.diagnose(each, chosen, rejected, 0.1)
    assert seen.loss == pytest.approx(np.mean([math.log1p(math.exp(-x)) for x in (3, 2, -0.3, 0.05)]), rel=1e-6)
    assert (seen.reward_chosen, seen.reward_rejected) == pytest.approx((-0.2625, -1.45))
    assert seen.margin == pytest.approx(1.1875)
    assert (seen.accuracy, seen.falling, seen.settled) == (0.75, 0.5, 0.25)
