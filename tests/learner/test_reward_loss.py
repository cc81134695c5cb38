"""The reward model's losses against oracles, finite differences and their own promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import reward

scores = st.floats(-30, 30)


@settings(max_examples=50)
@given(st.lists(st.tuples(scores, scores, st.floats(0.1, 5)), min_size=1, max_size=9))
def test_a_pairs_loss_is_the_papers(pairs: list[tuple[float, float, float]]) -> None:
    chosen, rejected, weights = (np.array(column) for column in zip(*pairs, strict=True))
    expected = weights * (np.logaddexp(0, rejected - chosen) + 0.01 * (chosen + rejected) ** 2)
    ours = reward.pair_losses(torch.tensor(chosen), torch.tensor(rejected), torch.tensor(weights))
    assert ours.tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)


@settings(max_examples=50)
@given(st.lists(st.tuples(scores, scores, st.booleans(), st.floats(0.1, 5)), min_size=1, max_size=9))
def test_a_thumbs_loss_is_the_cross_entropy(thumbs: list[tuple[float, float, bool, float]]) -> None:
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*thumbs, strict=True)]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        columns[0] + columns[1], columns[2], weight=columns[3], reduction="none"
    )
    ours = reward.thumb_losses(columns[0], columns[1], columns[2].bool(), columns[3])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_the_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, weights = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    ups = torch.tensor([True, False, False, True, False])
    users, topics, tokens = (
        torch.tensor([0, 1, 1, -1, 2]),
        torch.tensor([0, -1, 1, 1, 0]),
        torch.tensor([3, 50, 9, 1, 400]),
    )

    def thumbs(scores: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        named = dict(zip(("users", "topics", "length"), parameters, strict=True))
        effects = torch.func.functional_call(reward.Effects(3, 2), named, (users, topics, tokens))
        ridge = 0.5 * sum(each.square().sum() for each in parameters)
        return reward.thumb_losses(scores, effects, ups, weights.abs()).sum() + ridge

    assert torch.autograd.gradcheck(
        lambda one, two: reward.pair_losses(one, two, weights.abs()),
        (first.clone().requires_grad_(), second.clone().requires_grad_()),
    )
    inputs = [
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in ((5,), (3,), (2,), ())
    ]
    assert torch.autograd.gradcheck(thumbs, inputs)


def test_effects_are_looked_up_and_unknown_ones_are_zero() -> None:
    effects = reward.Effects(2, 2)
    with torch.no_grad():
        effects.users.copy_(torch.tensor([1.0, 2.0]))
        effects.topics.copy_(torch.tensor([10.0, 20.0]))
        effects.length.fill_(3.0)
    users, topics, tokens = torch.tensor([1, 0, -1]), torch.tensor([0, -1, -1]), torch.tensor([100, 200, 50])
    assert effects(users, topics, tokens).tolist() == pytest.approx([12, 1 + 3 * math.log(2), -3 * math.log(2)])
    assert effects.ridge(0.5).item() == pytest.approx(0.25 * (1 + 4 + 100 + 400 + 9))


def test_no_user_and_no_topic_is_no_error() -> None:
    effects = reward.Effects(0, 0)
    assert effects(torch.tensor([-1]), torch.tensor([-1]), torch.tensor([100])).tolist() == [0]


def test_a_lavish_user_a_hated_topic_and_length_are_not_the_answers_merit() -> None:
    """Answers come in two kinds of equal logit distance; what else moves thumbs is fitted by the effects, not by s."""
    generator = torch.Generator().manual_seed(0)
    n = 4000
    good = torch.rand(n, generator=generator) < 0.5
    users, topics = torch.randint(4, (n,), generator=generator), torch.randint(2, (n,), generator=generator)
    users = torch.where(good & (torch.rand(n, generator=generator) < 0.7), 0, users)  # the lavish one asks for the good
    tokens = torch.randint(20, 500, (n,), generator=generator)
    logits = 2.0 * good - 1 + torch.tensor([2.0, 0.0, 0.0, -2.0])[users] + torch.tensor([0.5, -0.5])[topics]
    ups = torch.rand(n, generator=generator) < torch.sigmoid(logits + 0.8 * torch.log(tokens / 100))
    effects, score = reward.Effects(4, 2), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([score, *effects.parameters()], max_iter=60)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        each = reward.thumb_losses(score[good.long()], effects(users, topics, tokens), ups, torch.ones(n))
        loss = (each.sum() + effects.ridge(1.0)) / n
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(step)  # type: ignore[no-untyped-call]
    merit = (score[1] - score[0]).item()
    assert merit == pytest.approx(2, abs=0.25)
    naive = [torch.logit(ups[good == kind].float().mean()).item() for kind in (False, True)]
    assert naive[1] - naive[0] > 2.4
    assert effects.length.item() == pytest.approx(0.8, abs=0.15)
    assert (effects.users[0] - effects.users[3]).item() == pytest.approx(4, abs=0.5)


trusts = st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=6)


@settings(max_examples=50)
@given(trusts, trusts, st.floats(0.1, 3), st.floats(0.1, 3))
def test_pairs_and_thumbs_weigh_as_asked(
    pairs: list[float], thumbs: list[float], weight_pairs: float, weight_thumbs: float
) -> None:
    given = torch.tensor(pairs, dtype=torch.float64), torch.tensor(thumbs, dtype=torch.float64)
    ours = reward.joint_weights(*given, weight_pairs, weight_thumbs)
    sums = [weights.sum().item() for weights in ours]
    assert sum(sums) == pytest.approx(len(pairs) + len(thumbs) if any(pairs + thumbs) else 0)
    if any(pairs) and any(thumbs):
        assert sums[0] / sums[1] == pytest.approx(weight_pairs / weight_thumbs)
    for weights, trust in zip(ours, given, strict=True):
        torch.testing.assert_close(weights * trust.sum(), trust * weights.sum())


def test_rewards_are_spreads_above_the_reference_and_clipped() -> None:
    calibration = reward.calibrate(torch.tensor([1.0, 3.0]))
    assert (calibration.mean, calibration.spread) == (2, 1)
    assert calibration.rewards(torch.tensor([2.0, 3.5, -90.0, 90.0])).tolist() == [0, 1.5, -5, 5]


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0], [1.0, math.nan], [1.0, math.inf]])
def test_scores_that_tell_nothing_apart_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="tells no answer from another"):
        reward.calibrate(torch.tensor(scores))


def test_diagnostics_describe_the_batch() -> None:
    seen = reward.diagnose(
        0.7,
        chosen=torch.tensor([2.0, 0.0]),
        rejected=torch.tensor([1.0, 1.0]),
        scores=torch.tensor([3.0, -1.0]),
        effects=torch.tensor([-4.0, 0.5]),
        ups=torch.tensor([True, False]),
    )
    assert (seen.loss, seen.pair_accuracy, seen.pair_margin, seen.thumb_accuracy) == (0.7, 0.5, 0, 0.5)
    assert (seen.score_mean, seen.score_spread) == pytest.approx((1, math.sqrt(5 / 3)))
