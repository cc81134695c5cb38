"""The KTO loss against an oracle, finite differences and its own promises."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import kto
from learner.logprobs import Row, sequence_logprobs
from learner.policy import Policy


def oracle(
    policy: Sequence[float],
    reference: Sequence[float],
    ups: Sequence[bool],
    weights: Sequence[float],
    z0: float = 0.0,
) -> float:
    """Equation 7 with β = 0.1, in NumPy, as the paper writes it."""
    total = 0.0
    for p, q, up, weight in zip(policy, reference, ups, weights, strict=True):
        gained = p - q - max(0.0, z0)
        value = weight / (1 + np.exp(-0.1 * gained)) if up else weight / (1 + np.exp(0.1 * gained))
        total += weight - value
    return total / len(ups)


rows = st.lists(
    st.tuples(st.floats(-200, 0), st.floats(-200, 0), st.booleans(), st.floats(0.1, 5)), min_size=1, max_size=9
)


@settings(max_examples=50)
@given(rows, st.floats(-20, 20))
def test_the_loss_is_the_papers(rows: list[tuple[float, float, bool, float]], z0: float) -> None:
    policy, reference, ups, weights = (list(column) for column in zip(*rows, strict=True))
    ours = kto.losses(
        torch.tensor(policy, dtype=torch.float64),
        torch.tensor(reference, dtype=torch.float64),
        torch.tensor(ups),
        torch.tensor(weights, dtype=torch.float64),
        0.1,
        z0,
    )
    assert ours.mean().item() == pytest.approx(oracle(policy, reference, ups, weights, z0), rel=1e-9, abs=1e-12)


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


@pytest.mark.parametrize("z0", [-3.0, 0.0, 2.5])
def test_the_gradient_is_that_of_finite_differences(z0: float) -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference, weights = 8 * torch.randn(3, 7, generator=generator, dtype=torch.float64)
    ups = torch.tensor([True, False, True, False, False, True, False])
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: kto.losses(p, reference, ups, weights.abs(), 0.3, z0), policy)


def test_an_up_pulls_up_and_a_down_pushes_down() -> None:
    policy = torch.tensor([-3.0, -3.0], requires_grad=True)
    loss = kto.losses(policy, torch.tensor([-3.0, -3.0]), torch.tensor([True, False]), torch.ones(2), 0.1).sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient.tolist() == pytest.approx([-0.025, 0.025])  # βσ′(0) = 0.1 · 0.25


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.floats(0.1, 4), st.floats(0.1, 4))
def test_classes_weigh_as_asked_whatever_the_batch_holds(ups: list[bool], weight_up: float, weight_down: float) -> None:
    weights = kto.class_weights(ups, weight_up, weight_down)
    assert sum(weights) == pytest.approx(len(ups))
    of_ups = sum(w for w, up in zip(weights, ups, strict=True) if up)
    if any(ups) and not all(ups):
        assert of_ups / (len(ups) - of_ups) == pytest.approx(weight_up / weight_down)


votes = st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=30)


@settings(max_examples=50)
@given(votes, st.floats(0.1, 4), st.floats(0.1, 4))
def test_classes_weigh_as_asked_by_trust(votes: list[tuple[bool, float]], weight_up: float, weight_down: float) -> None:
    ups, trust = [up for up, _ in votes], [trusted for _, trusted in votes]
    weights = kto.class_weights(ups, weight_up, weight_down, trust)
    assert sum(weights) == pytest.approx(len(ups) if any(trust) else 0)
    of_ups = sum(w for w, up in zip(weights, ups, strict=True) if up)
    of_downs = sum(w for w, up in zip(weights, ups, strict=True) if not up)
    if of_ups and of_downs:
        assert of_ups / of_downs == pytest.approx(weight_up / weight_down)
    shares = {(up, w / t) for w, (up, t) in zip(weights, votes, strict=True) if t}
    for one, two in itertools.combinations(shares, 2):
        assert one[0] != two[0] or one[1] == pytest.approx(two[1])
    assert all(w == 0 for w, t in zip(weights, trust, strict=True) if t == 0)


def test_the_same_trust_for_all_changes_nothing() -> None:
    ups = [True, False, False]
    assert kto.class_weights(ups, 1, 1.5, [0.3] * 3) == pytest.approx(kto.class_weights(ups, 1, 1.5))


def test_mismatched_pairs_are_the_papers_where_all_rows_differ() -> None:
    rows = [Row([i], [10 + i]) for i in range(5)]
    assert kto.mismatched(rows) == [Row([i], [10 + (i + 1) % 5]) for i in range(5)]


few = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=12)


@settings(max_examples=50)
@given(few)
def test_no_prompt_meets_an_answer_of_its_own_and_nothing_is_used_twice(pairs: list[tuple[int, int]]) -> None:
    rows = [Row([prompt], [10 + answer]) for prompt, answer in pairs]
    made = kto.mismatched(rows)
    own = {(row.prompt[0], row.completion[0]) for row in rows}
    assert not own & {(row.prompt[0], row.completion[0]) for row in made}
    for column in ("prompt", "completion"):
        before = Counter(getattr(row, column)[0] for row in rows)
        assert Counter(getattr(row, column)[0] for row in made) <= before


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=15))
def test_no_row_is_left_out_while_no_prompt_has_more_than_half(prompts: list[int]) -> None:
    rows = [Row([prompt], [10 + i]) for i, prompt in enumerate(prompts)]
    largest = max(Counter(prompts).values())
    made = kto.mismatched(rows)
    assert len(made) == len(rows) if 2 * largest <= len(rows) else len(made) <= 2 * (len(rows) - largest)
    assert bool(made) == (len(set(prompts)) > 1)


def test_z0_is_the_mean_log_ratio_and_zero_where_there_is_no_pair() -> None:
    assert kto.estimate_z0(torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -3.0])) == 0.5
    assert kto.estimate_z0(torch.tensor([]), torch.tensor([])) == 0


def test_z0_makes_an_up_that_gained_less_than_it_pull_harder_than_a_down() -> None:
    policy, reference = torch.tensor([1.0, 1.0], requires_grad=True), torch.zeros(2)
    loss = kto.losses(policy, reference, torch.tensor([True, False]), torch.ones(2), 1.0, z0=3.0).sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient.tolist() == pytest.approx([-0.10499, 0.10499], rel=1e-4)  # σ′(−2), not σ′(1) = 0.19661
    assert kto.losses(
        policy, reference, torch.tensor([True, False]), torch.ones(2), 1.0, 3.0
    ).tolist() == pytest.approx([0.88080, 0.11920], rel=1e-4)


def test_a_z0_below_zero_is_reported_and_not_used() -> None:
    batch = torch.tensor([0.5, -1.0]), torch.zeros(2), torch.tensor([True, False]), torch.ones(2), 0.1
    assert torch.equal(kto.losses(*batch, z0=-2.0), kto.losses(*batch))
    assert kto.diagnose(*batch, z0=-2.0).z0 == -2
    assert kto.diagnose(*batch).z0 == 0


@settings(max_examples=50)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8))
def test_a_moving_average_starts_as_the_mean(samples: list[float]) -> None:
    average = kto.MovingAverage()
    assert average.value == 0
    for sample in samples:
        average = average.update(sample)
    assert average.value == pytest.approx(np.mean(samples), abs=1e-9)
    assert average.seen == len(samples)


def test_a_moving_average_forgets() -> None:
    average = kto.MovingAverage(value=5.0, seen=1000)
    for _ in range(50):
        average = average.update(1.0)
    assert average.value == pytest.approx(1 + 4 * 0.9**50)
    assert average.update(2.0).value == pytest.approx(0.9 * average.value + 0.2)


@pytest.mark.parametrize("sample", [math.nan, math.inf])
def test_a_moving_average_is_not_spoiled(sample: float) -> None:
    with pytest.raises(ValueError, match="spoil"):
        kto.MovingAverage().update(sample)


def test_saturation_is_counted_from_z0() -> None:
    batch = torch.tensor([40.0, 40.0]), torch.zeros(2), torch.tensor([True, False]), torch.ones(2), 0.1
    assert kto.diagnose(*batch).saturated == 1
    assert kto.diagnose(*batch, z0=35.0).saturated == 0


def test_a_row_far_from_the_reference_counts_as_saturated() -> None:
    reference, ups = torch.zeros(2), torch.tensor([True, False])
    seen = kto.diagnose(torch.tensor([40.0, -1.0]), reference, ups, torch.ones(2), 0.1)
    assert seen.saturated == 0.5
    assert seen.margin == pytest.approx(4.1)
    assert math.isclose(seen.loss, oracle([40.0, -1.0], [0, 0], [True, False], [1, 1]), rel_tol=1e-5)
