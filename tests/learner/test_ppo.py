"""PPO against a reference in plain NumPy, token by token as the papers write it, and finite differences."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import ppo

BATCHES = {
    "several": [5, 2, 7, 1, 4],
    "two": [3, 6],
    "one": [6],
    "one token each": [1, 1, 1],
    "one token": [1],
}


class Batch:
    """Random answers of these lengths: as lists of NumPy arrays, and as padded tensors with rubbish in the padding."""

    def __init__(self, lengths: Sequence[int], seed: int = 0) -> None:
        self.lengths = lengths
        self._random = np.random.default_rng(seed)
        self.mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        self.policy, self.policy_ = self.column(-1.5)
        self.reference, self.reference_ = self.column(-1.5)
        self.values, self.values_ = self.column()
        self.advantages, self.advantages_ = self.column()
        self.returns, self.returns_ = self.column()
        self.old = [row + 0.3 * self._random.normal(size=len(row)) for row in self.policy]
        self.old_ = self.pad(self.old)
        self.behaviour = [row + 0.6 * self._random.normal(size=len(row)) for row in self.old]
        self.behaviour_ = self.pad(self.behaviour)
        self.old_values = [row + 0.3 * self._random.normal(size=len(row)) for row in self.values]
        self.old_values_ = self.pad(self.old_values)
        self.scores = self._random.normal(size=len(lengths))
        self.ended = self._random.random(len(lengths)) < 0.5

    def column(self, mean: float = 0.0) -> tuple[list[Any], torch.Tensor]:
        rows = [mean + self._random.normal(size=length) for length in self.lengths]
        return rows, self.pad(rows)

    def pad(self, rows: list[Any]) -> torch.Tensor:
        padded = np.full((len(rows), max(self.lengths)), 0.77)
        for place, row in zip(padded, rows, strict=True):
            place[: len(row)] = row
        return torch.tensor(padded)

    def same(self, ours: torch.Tensor, expected: list[Any]) -> None:
        """To 1e-6 on each token, and nothing at all in the padding."""
        assert not ours[~self.mask].any()
        np.testing.assert_allclose(ours[self.mask].detach().numpy(), np.concatenate(expected), rtol=1e-6, atol=1e-9)


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> Batch:
    return Batch(BATCHES[request.param])


def test_the_kl_and_the_score_are_the_reward(batch: Batch) -> None:
    expected = []
    for policy, reference, score, ended in zip(batch.policy, batch.reference, batch.scores, batch.ended, strict=True):
        row = [-0.2 * (p - q) for p, q in zip(policy, reference, strict=True)]
        row[-1] += score if ended else score - 1.5
        expected.append(row)
    policy = batch.policy_.requires_grad_()
    ended = torch.tensor(batch.ended)
    ours = ppo.token_rewards(torch.tensor(batch.scores), policy, batch.reference_, batch.mask, 0.2, ended, 1.5)
    batch.same(ours, expected)
    assert not ours.requires_grad


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (1.0, 0.0)])
def test_advantages_are_the_double_sum_of_the_paper(batch: Batch, gamma: float, lam: float) -> None:
    """Equation 16 of arXiv 1506.02438 as it stands: Σ_l (γλ)^l δ_{t+l}, not the recursion."""
    advantages, returns = [], []
    for rewards, values in zip(batch.advantages, batch.values, strict=True):
        after = [*values[1:], 0.0]
        deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
        row = [
            sum((gamma * lam) ** ahead * delta for ahead, delta in enumerate(deltas[t:])) for t in range(len(deltas))
        ]
        advantages.append(row)
        returns.append([a + v for a, v in zip(row, values, strict=True)])
    ours = ppo.advantages(torch.where(batch.mask, batch.advantages_, 0.0), batch.values_, batch.mask, gamma, lam)
    batch.same(ours[0], advantages)
    batch.same(ours[1], returns)


def test_with_lambda_one_the_return_is_the_sum_of_rewards_to_come() -> None:
    batch = Batch([5])
    _, returns = ppo.advantages(batch.advantages_, batch.values_, batch.mask, lam=1.0)
    assert returns[0].tolist() == pytest.approx(np.cumsum(batch.advantages[0][::-1])[::-1].tolist())


def test_whitening_is_over_the_tokens_of_the_batch(batch: Batch) -> None:
    every = np.concatenate(batch.advantages)
    expected = [(row - every.mean()) / np.sqrt(every.var() + 1e-8) for row in batch.advantages]
    batch.same(ppo.whiten(batch.advantages_, batch.mask), expected)


def test_the_policy_loss_is_the_papers(batch: Batch) -> None:
    expected = []
    for policy, old, advantages in zip(batch.policy, batch.old, batch.advantages, strict=True):
        ratios = [math.exp(p - q) for p, q in zip(policy, old, strict=True)]
        expected.append([-min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios, advantages, strict=True)])
    batch.same(ppo.policy_losses(batch.policy_, batch.old_, batch.advantages_, batch.mask), expected)


def test_the_value_loss_is_clipped_around_the_old_values(batch: Batch) -> None:
    expected = []
    for values, old, returns in zip(batch.values, batch.old_values, batch.returns, strict=True):
        clipped = [o + min(max(v - o, -0.2), 0.2) for v, o in zip(values, old, strict=True)]
        expected.append(
            [0.5 * max((v - r) ** 2, (c - r) ** 2) for v, c, r in zip(values, clipped, returns, strict=True)]
        )
    batch.same(ppo.value_losses(batch.values_, batch.old_values_, batch.returns_, batch.mask), expected)


def test_the_decoupled_loss_corrects_for_the_behaviour_and_clips_around_the_recent(batch: Batch) -> None:
    """The old policy is the proximal one here, and the behaviour policy a third."""
    expected, weights = [], []
    for policy, proximal, behaviour, advantages in zip(
        batch.policy, batch.old, batch.behaviour, batch.advantages, strict=True
    ):
        row = [min(math.exp(p - b), 2.0) for p, b in zip(proximal, behaviour, strict=True)]
        ratios = [math.exp(p - q) for p, q in zip(policy, proximal, strict=True)]
        expected.append(
            [-w * min(r * a, min(max(r, 0.8), 1.2) * a) for w, r, a in zip(row, ratios, advantages, strict=True)]
        )
        weights.append(row)
    ours = ppo.behaviour_weights(batch.old_, batch.behaviour_, batch.mask)
    batch.same(ours, weights)
    batch.same(ppo.decoupled_losses(batch.policy_, batch.old_, batch.advantages_, ours, batch.mask), expected)


def test_without_a_cap_and_on_policy_the_decoupled_gradient_is_that_of_importance_sampling() -> None:
    """∇ −(π/μ) A where πprox = π: the weight supplies πprox/μ, the ratio the gradient."""
    batch = Batch([5, 3])
    policy = batch.policy_.requires_grad_()
    weights = ppo.behaviour_weights(policy, batch.behaviour_, batch.mask, cap=math.inf)
    loss = ppo.decoupled_losses(policy, policy, batch.advantages_, weights, batch.mask).sum()
    (ours,) = torch.autograd.grad(loss, policy)
    expected = -(policy - batch.behaviour_).exp() * batch.advantages_
    torch.testing.assert_close(ours, torch.where(batch.mask, expected.detach(), 0.0))


def test_the_gradients_are_those_of_finite_differences() -> None:
    batch = Batch([5, 2, 7])
    mask, advantages = batch.mask, batch.advantages_
    weights = ppo.behaviour_weights(batch.old_, batch.behaviour_, mask)
    policy, values = batch.policy_.requires_grad_(), batch.values_.requires_grad_()
    check = partial(torch.autograd.gradcheck, inputs=policy)
    assert check(lambda p: ppo.policy_losses(p, batch.old_, advantages, mask))
    assert check(lambda p: ppo.decoupled_losses(p, batch.old_, advantages, weights, mask))
    assert torch.autograd.gradcheck(
        lambda v: ppo.value_losses(v, batch.old_values_, batch.returns_, mask), inputs=values
    )


def test_losses_of_buckets_add_up_to_those_of_the_batch() -> None:
    whole, alone = Batch([5, 2, 7]), torch.zeros(())
    losses = ppo.policy_losses(whole.policy_, whole.old_, whole.advantages_, whole.mask)
    for i, length in enumerate(whole.lengths):
        row = (slice(i, i + 1), slice(0, length))
        alone = (
            alone
            + ppo.policy_losses(whole.policy_[row], whole.old_[row], whole.advantages_[row], whole.mask[row]).sum()
        )
    assert alone.item() == pytest.approx(losses.sum().item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.5, 1, 0), (0.5, 1, -0.5), (0.5, -1, 0), (1.5, -1, 1.5), (1, 2, -2)],
)
def test_only_what_went_too_far_in_the_wanted_direction_stops_counting(
    ratio: float, advantage: float, slope: float
) -> None:
    policy = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss = ppo.policy_losses(policy, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), torch.ones(1, 1).bool())
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient.item() == pytest.approx(slope)


def test_nothing_in_the_padding_reaches_a_loss_or_a_gradient() -> None:
    batch = Batch([2, 4])
    policy = torch.where(batch.mask, batch.policy_, 500.0).requires_grad_()
    losses = ppo.policy_losses(policy, batch.old_, batch.advantages_, batch.mask)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert gradient.isfinite().all()
    assert not gradient[~batch.mask].any()


@settings(max_examples=50)
@given(st.floats(0, 30), st.integers(1, 500))
def test_the_controller_is_the_papers(kl: float, answers: int) -> None:
    controller = ppo.Controller(beta=0.1, target=6.0, horizon=10000)
    error = np.clip((kl - 6.0) / 6.0, -0.2, 0.2)
    assert controller.update(kl, answers).beta == pytest.approx(0.1 * (1 + error * answers / 10000), rel=1e-12)


def test_the_controller_steers_to_its_target() -> None:
    """In a world where KL = 1/β it ends where that is the target."""
    controller = ppo.Controller(beta=0.01, target=4.0, horizon=1000)
    for _ in range(2000):
        controller = controller.update(1 / controller.beta, 64)
    assert 1 / controller.beta == pytest.approx(4, rel=1e-3)


def test_an_update_stops_once_the_policy_has_moved() -> None:
    batch = Batch([4, 3])
    every = [
        math.exp(p - q) - 1 - (p - q)
        for a, b in zip(batch.policy, batch.old, strict=True)
        for p, q in zip(a, b, strict=True)
    ]
    kl = float(np.mean(every))
    arguments = batch.policy_, batch.old_, batch.mask
    assert ppo.moved(*arguments) == pytest.approx(kl)
    assert ppo.stop_early(*arguments, target=kl / 1.6)
    assert not ppo.stop_early(*arguments, target=kl / 1.4)
    assert ppo.stop_early(torch.full_like(batch.policy_, math.nan), *arguments[1:], target=1.0)


def test_what_moved_is_an_estimate_of_the_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    tokens = torch.multinomial(old.exp(), 200_000, replacement=True, generator=generator)
    exact = (old.exp() * (old - new)).sum().item()
    seen = ppo.moved(new[tokens][None], old[tokens][None], torch.ones(1, len(tokens)).bool())
    assert seen == pytest.approx(exact, rel=0.02)


def test_old_rows_are_dropped() -> None:
    assert ppo.fresh(torch.tensor([0, 4, 5])).tolist() == [True, True, False]


def test_rows_that_something_else_sampled_are_dropped() -> None:
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    behaviour = torch.zeros(4, 2)
    proximal = torch.tensor([[0.9, -0.9], [0.1, 9.0], [-0.5, 0.0], [0.2, 0.3]])
    assert ppo.near(proximal, behaviour, mask).tolist() == [True, True, False, False]


@settings(max_examples=50)
@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=20))
def test_the_effective_share_is_kishs(weights: list[float]) -> None:
    padded = torch.tensor([[*weights, 50.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * len(weights) + [False]])
    expected = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
    assert ppo.effective_share(padded, mask) == pytest.approx(expected)
    assert ppo.enough(padded, mask) == (expected >= 0.3 or expected == pytest.approx(0.3))


@pytest.mark.parametrize(
    ("weights", "enough"),
    [([1.0] * 10, True), ([2.0] * 3 + [1e-9] * 7, True), ([2.0] * 2 + [0.0] * 8, False), ([0.0] * 4, False)],
)
def test_an_update_worth_too_few_samples_is_skipped(weights: list[float], enough: bool) -> None:
    assert ppo.enough(torch.tensor([weights]), torch.ones(1, len(weights)).bool()) == enough


def test_an_empty_batch_is_not_enough() -> None:
    assert not ppo.enough(torch.ones(2, 3), torch.zeros(2, 3).bool())


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=2, max_size=19).filter(lambda ups: len(set(ups)) == 2))
def test_thumbs_are_rewards_with_mean_zero_and_classes_that_pull_alike(ups: list[bool]) -> None:
    given = torch.tensor(ups)
    rewards = ppo.thumb_rewards(given, ppo.up_rate(given, torch.ones(len(ups), dtype=torch.float64)))
    assert rewards.sum().item() == pytest.approx(0, abs=1e-5)
    assert rewards[given].sum().item() == pytest.approx(len(ups) / 2, rel=1e-5)


def test_the_rate_counts_trust_and_stays_away_from_certainty() -> None:
    ups = torch.tensor([True, False, False])
    assert ppo.up_rate(ups, torch.tensor([1.0, 0.5, 0.0])) == pytest.approx(2 / 3)
    assert ppo.up_rate(ups, torch.tensor([1.0, 0.0, 0.0])) == 0.95
    assert ppo.up_rate(ups, torch.tensor([0.0, 1.0, 0.0])) == 0.05
    assert ppo.up_rate(ups, torch.zeros(3)) == 0.5
    assert ppo.thumb_rewards(ups, 0.05).tolist() == pytest.approx([10, -0.5 / 0.95, -0.5 / 0.95])


def test_diagnostics_describe_the_batch() -> None:
    batch = Batch([5, 2, 7])
    ratios = [math.exp(p - q) for a, b in zip(batch.policy, batch.old, strict=True) for p, q in zip(a, b, strict=True)]
    advantages, returns = np.concatenate(batch.advantages), np.concatenate(batch.returns)
    clipped = [(r > 1.2 and a > 0) or (r < 0.8 and a < 0) for r, a in zip(ratios, advantages, strict=True)]
    seen = ppo.diagnose(
        batch.policy_, batch.old_, batch.advantages_, batch.values_, batch.old_values_, batch.returns_, batch.mask
    )
    losses = ppo.policy_losses(batch.policy_, batch.old_, batch.advantages_, batch.mask)
    assert seen.policy_loss == pytest.approx(losses.sum().item() / 14)
    assert seen.clipped == pytest.approx(np.mean(clipped))
    assert 0 < seen.clipped < 1
    assert seen.explained == pytest.approx(1 - np.var(returns - np.concatenate(batch.old_values)) / np.var(returns))
    assert seen.moved == pytest.approx(np.mean([r - 1 - math.log(r) for r in ratios]))

    weights = ppo.behaviour_weights(batch.old_, batch.behaviour_, batch.mask)
    logged = ppo.diagnose_logged(batch.policy_, batch.old_, batch.advantages_, weights, batch.mask)
    assert (logged.clipped, logged.moved) == pytest.approx((seen.clipped, seen.moved))
    assert logged.weight == pytest.approx(weights.sum().item() / 14)
    assert logged.effective == ppo.effective_share(weights, batch.mask)


def test_values_that_explain_all_of_one_return_explain_nothing() -> None:
    batch = Batch([1])
    columns = batch.policy_, batch.old_, batch.advantages_, batch.values_, batch.old_values_, batch.returns_, batch.mask
    assert math.isnan(ppo.diagnose(*columns).explained)
