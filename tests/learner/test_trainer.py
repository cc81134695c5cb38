"""An update moves the policy the way the votes say, or moves nothing; each algorithm through the same machinery."""

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.algorithm import Figures
from learner.examples import Thumb
from learner.logprobs import Row, sequence_logprobs
from learner.policy import Policy
from learner.trainer import Refused, Updated
from tests.learner.conftest import tiny
from tests.learner.making import GOOD, VARIANTS, Made, change, exactly, examples_for, pairs, thumbs
from thumbwheel.errors import SettingsError, ThumbwheelError
from thumbwheel.settings import LearnerSettings, Settings

pytestmark = pytest.mark.slow

every = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def policy(settings: Settings) -> Policy:
    return Policy(tiny(), settings, "sha256:test")


@pytest.fixture
def learner(settings: Settings) -> LearnerSettings:
    return change(settings.learner, fresh={"epochs": 1, "minibatches": 1})


def gained(policy: Policy, rows: list[Row]) -> list[float]:
    with torch.no_grad():
        ours = sequence_logprobs(policy.model, rows)
        with policy.reference():
            return (ours - sequence_logprobs(policy.model, rows)).tolist()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.split(",")[0] in ("kto", "bco", "ppo-logged")])
def test_ups_become_likelier_and_downs_less_likely(policy: Policy, learner: LearnerSettings, variant: str) -> None:
    made = Made(policy, change(learner, learning_rate=1e-3, **VARIANTS[variant]))
    learned = thumbs(policy)
    for _ in range(5):
        result = made.trainer.update(learned)
        assert isinstance(result, Updated)
    change_of = gained(policy, [Row(thumb.prompt, thumb.completion) for thumb in learned])
    ups = [value for value, thumb in zip(change_of, learned, strict=True) if thumb.up]
    downs = [value for value, thumb in zip(change_of, learned, strict=True) if not thumb.up]
    assert min(ups) > 0
    assert max(downs) < 0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("dpo")])
def test_chosen_answers_gain_on_rejected_ones(policy: Policy, learner: LearnerSettings, variant: str) -> None:
    made = Made(policy, change(learner, **VARIANTS[variant]))
    for _ in range(4):
        result = made.trainer.update(pairs())
    assert isinstance(result, Updated)
    for pair in pairs():
        chosen, rejected = gained(policy, [Row(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)])
        assert chosen > rejected + 0.2
    assert result.figures["margin"] > 0
    assert result.figures["accuracy"] == 1


@pytest.mark.parametrize("variant", ["ppo", "grpo", "gspo"])
def test_what_the_reward_likes_becomes_more_frequent(policy: Policy, learner: LearnerSettings, variant: str) -> None:
    chosen = change(learner, algorithm=variant, fresh={"answers": 16, "epochs": 2, "minibatches": 2})
    made = Made(policy, change(chosen, ppo={"unfinished_penalty": 0.0}))
    seen: list[Figures] = []
    for _ in range(12):
        result = made.trainer.update(thumbs(policy))
        assert isinstance(result, Updated)
        seen.append(result.figures)
    first, last = (sum(figures["reward"] for figures in some) / 3 for some in (seen[:3], seen[-3:]))
    assert last > first + 0.15


@every
def test_cutting_a_batch_into_parts_changes_nothing(
    policy: Policy, learner: LearnerSettings, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(policy, change(learner, **VARIANTS[variant]))
    made.trainer.update(examples_for(made))
    once = policy.weights()
    policy.start(None)
    for tokens in ("PART_TOKENS", "READ_TOKENS"):
        monkeypatch.setattr(f"learner.compute.{tokens}", 1)
    again = Made(policy, change(learner, **VARIANTS[variant]))
    again.trainer.update(examples_for(again))
    for name, weights in policy.weights().items():
        assert torch.allclose(weights, once[name], atol=1e-5), name


@pytest.mark.parametrize("variant", ["kto", "dpo", "ppo"])
def test_recomputing_activations_where_memory_is_short_changes_nothing(
    policy: Policy, learner: LearnerSettings, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(policy, change(learner, **VARIANTS[variant]))
    made.trainer.update(examples_for(made))
    once = policy.weights()
    policy.start(None)
    asked: list[int] = []

    def short(model: Any, tokens: int) -> bool:
        asked.append(tokens)
        return True

    monkeypatch.setattr("learner.compute.needs_checkpointing", short)
    again = Made(policy, change(learner, **VARIANTS[variant]))
    again.trainer.update(examples_for(again))
    assert asked
    for name, weights in policy.weights().items():
        assert torch.allclose(weights, once[name], atol=1e-6), name


@every
def test_the_gradient_is_that_of_finite_differences(exact: Policy, learner: LearnerSettings, variant: str) -> None:
    """Of the loss over all of it, along the gradient and along a random direction, value head included; fp64."""
    exactly(exact)
    made = Made(exact, change(learner, **VARIANTS[variant]))
    if made.algorithm.head is not None:
        torch.nn.init.normal_(made.algorithm.head.weight, generator=torch.Generator().manual_seed(3))
    plan = made.algorithm.plan(examples_for(made), made.models)
    parameters = made.compute.parameters()
    step = torch.Generator().manual_seed(4)
    with torch.no_grad():  # away from where ratios are all one
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=step, dtype=parameter.dtype), alpha=0.02)
    made.compute.gradient(plan)
    gradient = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert len(gradient) == len(parameters)

    def loss(along: list[torch.Tensor], size: float) -> float:
        adapter = len(exact.parameters())  # the value head sees it, and sends no gradient into it
        move(along, size)
        policy, _ = made.compute.read(plan.rows)
        move(along[:adapter], -size)
        _, values = made.compute.read(plan.rows)
        total, _ = made.algorithm(plan.batch(range(len(plan.rows)), policy, values))
        move([*(0 * direction for direction in along[:adapter]), *along[adapter:]], -size)
        return total.item()

    @torch.no_grad()
    def move(along: list[torch.Tensor], size: float) -> None:
        for parameter, direction in zip(parameters, along, strict=False):
            parameter.add_(direction, alpha=size)

    random = [torch.randn(g.shape, generator=step, dtype=g.dtype) for g in gradient]
    for along in (gradient, random):
        slope = sum((g * d).sum().item() for g, d in zip(gradient, along, strict=True))
        norm = math.sqrt(sum(d.square().sum().item() for d in along))
        measured = (loss(along, 1e-5 / norm) - loss(along, -1e-5 / norm)) / 2e-5
        assert measured == pytest.approx(slope / norm, rel=1e-5, abs=1e-8)


@every
def test_an_example_that_the_model_gives_no_numbers_is_named_and_no_weight_moves(
    policy: Policy, learner: LearnerSettings, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(policy, change(learner, learning_rate=1e-4, **VARIANTS[variant]))
    learned = examples_for(made)
    made.trainer.update(learned)
    before, state = policy.weights(), str(made.trainer.state())

    def gradient(plan: Any, progress: Any = None) -> Any:
        seen, values = made.compute.read(plan.rows)
        seen[[i for i, owner in enumerate(plan.owners) if owner == 1]] = math.nan
        return seen, values

    monkeypatch.setattr(made.compute, "gradient", gradient)
    result = made.trainer.update(learned)
    assert isinstance(result, Refused)
    assert list(result.left_out) == [1]
    assert "not finite" in result.left_out[1]
    assert all(torch.equal(before[name], weights) for name, weights in policy.weights().items())
    assert str(made.trainer.state()) == state


@every
def test_a_restored_trainer_goes_on_as_if_nothing_had_happened(
    policy: Policy, learner: LearnerSettings, variant: str
) -> None:
    chosen = change(learner, fresh={"epochs": 2, "minibatches": 2}, **VARIANTS[variant])
    made = Made(policy, chosen)
    made.trainer.update(examples_for(made))
    weights, state, random = policy.weights(), made.trainer.state(), made.models._generator.get_state()
    file = io.BytesIO()
    torch.save(state, file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    made.trainer.update(examples_for(made))
    expected = policy.weights()
    policy.set_weights(weights)
    again = Made(policy, chosen)
    again.trainer.restore(state)
    again.models._generator.set_state(random)
    again.trainer.update(examples_for(again))
    assert all(torch.equal(expected[name], w) for name, w in policy.weights().items())


def test_a_stop_in_the_middle_leaves_everything_as_it_was(policy: Policy, learner: LearnerSettings) -> None:
    made = Made(policy, change(learner, algorithm="ppo", fresh={"epochs": 3, "minibatches": 2}))
    made.trainer.update(thumbs(policy))
    before, state = policy.weights(), str(made.trainer.state())
    calls = iter(range(100))

    def progress(_: int) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.trainer.update(thumbs(policy), progress)
    assert all(torch.equal(before[name], weights) for name, weights in policy.weights().items())
    assert str(made.trainer.state()) == state


def test_a_gradient_that_is_no_number_is_an_error_and_no_weight_moves(
    policy: Policy, learner: LearnerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(policy, learner)
    before = policy.weights()
    policy.parameters()[0].register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
    with pytest.raises(ThumbwheelError, match="gradient of an update is not finite"):
        made.trainer.update(thumbs(policy))
    assert all(torch.equal(before[name], weights) for name, weights in policy.weights().items())


def test_a_large_gradient_of_the_values_does_not_shrink_the_policys(policy: Policy, learner: LearnerSettings) -> None:
    made = Made(policy, change(learner, algorithm="ppo", max_grad_norm=0.1))
    made.compute.gradient(made.algorithm.plan(thumbs(policy), made.models))
    assert made.algorithm.head is not None
    for parameter in made.algorithm.head.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    made.trainer._step()
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-3)) for p in policy.parameters() if p.grad is not None)


def test_ppo_stops_where_the_policy_has_moved_far_enough(policy: Policy, learner: LearnerSettings) -> None:
    chosen = change(learner, algorithm="ppo", fresh={"epochs": 50, "minibatches": 1}, learning_rate=5e-2)
    result = Made(policy, chosen).trainer.update(thumbs(policy))
    assert isinstance(result, Updated)
    assert 1 <= result.steps < 50


def test_logged_answers_that_are_old_or_of_another_policy_are_left_out_with_a_reason(
    policy: Policy, learner: LearnerSettings
) -> None:
    made = Made(policy, change(learner, algorithm="ppo-logged"))
    made.models.parent = "v9"
    given = [replace(thumb, version="v8") for thumb in thumbs(policy)]
    given[1] = replace(given[1], version="v2")
    given[2] = replace(given[2], behaviour=[p - 1 for p in given[2].behaviour])
    given.append(replace(given[3], behaviour=[]))
    result = made.trainer.update(given)
    assert isinstance(result, Updated)
    assert set(result.left_out) == {1, 2, 5}
    assert "not kept" in result.left_out[5]
    assert "v2" in result.left_out[1]
    assert "other probabilities" in result.left_out[2]


def test_logged_answers_of_another_policy_altogether_move_nothing(policy: Policy, learner: LearnerSettings) -> None:
    made = Made(policy, change(learner, algorithm="ppo-logged"))
    before = policy.weights()
    given = [replace(thumb, behaviour=[p - 2 for p in thumb.behaviour]) for thumb in thumbs(policy)]
    result = made.trainer.update(given)
    assert isinstance(result, Refused)
    assert set(result.left_out) == set(range(len(given)))
    assert all(torch.equal(before[name], weights) for name, weights in policy.weights().items())


@pytest.mark.parametrize("variant", ["kto", "bco", "kto, mismatched z0"])
@pytest.mark.parametrize("case", ["one", "ups", "downs", "one prompt", "one token each"])
def test_thin_batches_are_finite(policy: Policy, learner: LearnerSettings, variant: str, case: str) -> None:
    given = thumbs(policy)
    cases: dict[str, list[Thumb]] = {
        "one": given[:1],
        "ups": [thumb for thumb in given if thumb.up],
        "downs": [thumb for thumb in given if not thumb.up],
        "one prompt": [replace(thumb, prompt=[2, 3]) for thumb in given],
        "one token each": [replace(thumb, completion=thumb.completion[:1]) for thumb in given],
    }
    result = Made(policy, change(learner, **VARIANTS[variant])).trainer.update(cases[case])
    assert isinstance(result, Updated)
    assert math.isfinite(result.figures["loss"])
    assert all(weights.isfinite().all() for weights in policy.weights().values())


def test_an_empty_batch_and_the_wrong_kind_of_example_are_errors(policy: Policy, learner: LearnerSettings) -> None:
    before = policy.weights()
    for algorithm, given in (("kto", []), ("dpo", []), ("kto", pairs()), ("dpo", thumbs(policy))):
        with pytest.raises(TypeError, match="learns from"):
            Made(policy, change(learner, algorithm=algorithm)).trainer.update(given)
    assert all(torch.equal(before[name], weights) for name, weights in policy.weights().items())


def test_an_algorithm_that_is_not_there_is_named(policy: Policy, learner: LearnerSettings) -> None:
    with pytest.raises(SettingsError, match=r"'magic'; there are kto, bco, dpo"):
        Made(policy, change(learner, algorithm="magic"))


def test_the_tokens_of_a_batch_are_counted_once(policy: Policy, learner: LearnerSettings) -> None:
    result = Made(policy, learner).trainer.update(thumbs(policy))
    assert isinstance(result, Updated)
    assert result.tokens == sum(len(thumb.prompt) + len(thumb.completion) for thumb in thumbs(policy))
    assert GOOD in thumbs(policy)[0].completion
