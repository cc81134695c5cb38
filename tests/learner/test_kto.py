"""The KTO loss against an oracle, finite differences and its own promises."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner import kto
from learner.logprobs import Row, sequence_logprobs
from learner.policy import Policy


def oracle(policy: Sequence[float], reference: Sequence[float], ups: Sequence[bool], weights: Sequence[float]) -> float:
    """Equations 7 and 8 with z0 = 0 and β = 0.1, in NumPy, as the paper writes them."""
    total = 0.0
    for p, q, up, weight in zip(policy, reference, ups, weights, strict=True):
        value = weight / (1 + np.exp(-0.1 * (p - q))) if up else weight / (1 + np.exp(0.1 * (p - q)))
        total += weight - value
    return total / len(ups)


rows = st.lists(
    st.tuples(st.floats(-200, 0), st.floats(-200, 0), st.booleans(), st.floats(0.1, 5)), min_size=1, max_size=9
)


@given(rows)
def test_the_loss_is_the_papers(rows: list[tuple[float, float, bool, float]]) -> None:
    policy, reference, ups, weights = (list(column) for column in zip(*rows, strict=True))
    ours = kto.losses(
        torch.tensor(policy, dtype=torch.float64),
        torch.tensor(reference, dtype=torch.float64),
        torch.tensor(ups),
        torch.tensor(weights, dtype=torch.float64),
        0.1,
    )
    assert ours.mean().item() == pytest.approx(oracle(policy, reference, ups, weights), rel=1e-9, abs=1e-12)


def test_the_gradient_to_the_adapter_is_that_of_finite_differences(exact: Policy) -> None:
    batch = [Row([2, 3], [4, 5, 1]), Row([6], [7, 8])]
    ups, weights = torch.tensor([True, False]), torch.tensor([1.5, 0.5], dtype=torch.float64)
    with exact.reference(), torch.no_grad():
        reference = sequence_logprobs(exact.model, batch)

    def loss() -> torch.Tensor:
        return kto.losses(sequence_logprobs(exact.model, batch), reference, ups, weights, 0.1).sum()

    gradients = torch.autograd.grad(loss(), exact.parameters())
    with torch.no_grad():
        for parameter, gradient in zip(exact.parameters(), gradients, strict=True):
            place = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
            here = parameter[place].clone()
            sides = []
            for step in (1e-3, -1e-3):
                parameter[place] = here + step
                sides.append(loss().item())
            parameter[place] = here
            slope = (sides[0] - sides[1]) / 2e-3  # the norms of the model are fp32 even here
            assert slope == pytest.approx(gradient[place].item(), rel=5e-3, abs=1e-5)


def test_an_up_pulls_up_and_a_down_pushes_down() -> None:
    policy = torch.tensor([-3.0, -3.0], requires_grad=True)
    loss = kto.losses(policy, torch.tensor([-3.0, -3.0]), torch.tensor([True, False]), torch.ones(2), 0.1).sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient.tolist() == pytest.approx([-0.025, 0.025])  # βσ′(0) = 0.1 · 0.25


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.floats(0.1, 4), st.floats(0.1, 4))
def test_classes_weigh_as_asked_whatever_the_batch_holds(ups: list[bool], weight_up: float, weight_down: float) -> None:
    weights = kto.class_weights(ups, weight_up, weight_down)
    assert sum(weights) == pytest.approx(len(ups))
    of_ups = sum(w for w, up in zip(weights, ups, strict=True) if up)
    if any(ups) and not all(ups):
        assert of_ups / (len(ups) - of_ups) == pytest.approx(weight_up / weight_down)


def test_a_row_far_from_the_reference_counts_as_saturated() -> None:
    reference, ups = torch.zeros(2), torch.tensor([True, False])
    seen = kto.diagnose(torch.tensor([40.0, -1.0]), reference, ups, torch.ones(2), 0.1)
    assert seen.saturated == 0.5
    assert seen.margin == pytest.approx(4.1)
    assert math.isclose(seen.loss, oracle([40.0, -1.0], [0, 0], [True, False], [1, 1]), rel_tol=1e-5)
