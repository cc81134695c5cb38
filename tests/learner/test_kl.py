"""KL by sampling is KL by enumeration; what is held is inside the budget."""

import math
from itertools import product
from statistics import fmean

import pytest
import torch

from learner import kl
from learner.logprobs import Row, sequence_logprobs
from learner.policy import Policy
from tests.learner.conftest import VOCABULARY, move, tiny
from thumbwheel.settings import Settings

PROMPT = [2, 3]


@pytest.fixture
def policy(settings: Settings) -> Policy:
    policy = Policy(tiny(), settings, "sha256:test")
    move(policy, 0.3)
    return policy


@torch.no_grad()
def enumerated(policy: Policy) -> float:
    """KL of answers of at most two tokens, the first of which may end them (token 1): the sum over all of them."""
    rows = [Row(PROMPT, [1])]
    rows += [Row(PROMPT, list(pair)) for pair in product(range(VOCABULARY), repeat=2) if pair[0] != 1]
    ours = torch.cat([sequence_logprobs(policy.model, rows[i : i + 256]) for i in range(0, len(rows), 256)]).double()
    with policy.reference():
        theirs = torch.cat([sequence_logprobs(policy.model, rows[i : i + 256]) for i in range(0, len(rows), 256)])
    assert ours.exp().sum().item() == pytest.approx(1, abs=1e-4)
    return float((ours.exp() * (ours - theirs)).sum())


def test_the_estimate_is_the_enumerated_kl(policy: Policy) -> None:
    exact = enumerated(policy)
    estimate = kl.measure(policy, [PROMPT] * 3000, 2, 0.95, torch.Generator().manual_seed(0))
    each = [answer.kl for answer in estimate.answers]
    error = (estimate.upper - estimate.mean) / 1.645  # the standard error
    assert exact > 0.05
    assert abs(estimate.mean - exact) < 4 * error
    assert min(each) >= 0


def test_it_agrees_with_the_plain_estimator_and_varies_less(policy: Policy) -> None:
    estimate = kl.measure(policy, [PROMPT] * 2000, 6, 0.95, torch.Generator().manual_seed(0))
    plain = [sum(a.candidate) - sum(a.reference) for a in estimate.answers]
    bounds = [kl.upper_bound(values, 0.95) - fmean(values) for values in ([a.kl for a in estimate.answers], plain)]
    assert bounds[0] < bounds[1]
    assert abs(fmean(plain) - estimate.mean) < 4 * sum(bounds) / 1.645


def test_the_reference_is_at_distance_zero(settings: Settings) -> None:
    untrained = Policy(tiny(torch.bfloat16), settings, "sha256:test")
    estimate = kl.measure(untrained, [PROMPT] * 4, 8, 0.95, torch.Generator().manual_seed(0))
    assert (estimate.mean, estimate.upper) == (0, 0)


def test_log_probs_of_the_answers_are_those_of_the_two_models(policy: Policy) -> None:
    (answer, *_) = kl.measure(policy, [PROMPT] * 2, 6, 0.95, torch.Generator().manual_seed(0)).answers
    with torch.no_grad():
        assert sum(answer.candidate) == pytest.approx(sequence_logprobs(policy.model, [answer.row]).item(), abs=1e-4)
        with policy.reference():
            assert sum(answer.reference) == pytest.approx(
                sequence_logprobs(policy.model, [answer.row]).item(), abs=1e-4
            )


@pytest.mark.parametrize("budget", [0.05, 0.5, 2.0])
def test_a_policy_that_went_too_far_is_held_inside_the_budget(policy: Policy, budget: float) -> None:
    move(policy, 0.8)
    trained = policy.weights()
    scales = []

    def at(scale: float) -> kl.Estimate:
        policy.set_weights(trained, scale)
        scales.append(scale)
        return kl.measure(policy, [[2, i] for i in range(2, 32)], 8, 0.95, torch.Generator().manual_seed(0))

    first = at(1.0)
    assert first.upper > 2
    held = kl.hold(budget, first, at)
    assert held is not None
    scale, estimate = held
    assert 0 < scale < 1
    assert estimate.upper <= budget
    assert estimate is not first
    assert len(scales) <= 2 + kl.BISECTIONS


def made_up(upper: float) -> kl.Estimate:
    return kl.Estimate(upper, upper, upper, [])


def test_inside_the_budget_nothing_is_scaled() -> None:
    assert kl.hold(4, made_up(3.9), lambda scale: pytest.fail("measured again")) == (1.0, made_up(3.9))
    assert kl.hold(math.inf, made_up(500), lambda scale: pytest.fail("measured again")) == (1.0, made_up(500))


def test_what_no_scale_brings_inside_is_dropped() -> None:
    assert kl.hold(4, made_up(9), lambda scale: made_up(4.1)) is None
    assert kl.hold(math.inf, made_up(math.inf), lambda scale: made_up(1)) is None
    assert kl.hold(4, made_up(math.nan), lambda scale: made_up(1)) is None


def test_bisection_uses_most_of_the_budget_where_kl_is_no_square() -> None:
    held = kl.hold(4, made_up(100), lambda scale: made_up(100 * scale))
    assert held is not None
    assert 3 < held[1].upper <= 4


def test_the_bound_covers_the_mean_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    draws = torch.distributions.Gamma(2.0, 1.0).sample((2000, 64))  # of mean 2, skewed like a KL
    covered = fmean(kl.upper_bound(sample.tolist(), 0.95) >= 2 for sample in draws)
    assert 0.92 < covered < 0.97


def test_too_little_to_bound_is_unbounded() -> None:
    assert kl.upper_bound([1.0], 0.95) == math.inf
    assert kl.upper_bound([1.0, math.nan], 0.95) == math.inf
