"""An update moves the policy the way the votes say, or moves nothing."""

import io

import pytest
import torch

from learner.buffer import Example
from learner.logprobs import Row, sequence_logprobs
from learner.policy import Policy
from learner.trainer import Refused, Trainer, Updated
from tests.learner.conftest import tiny
from thumbwheel.settings import Settings

UP, DOWN = Example("f1", [2, 3], [4, 5, 1], True), Example("f2", [2, 3], [7, 8, 9, 10], False)


@pytest.fixture
def policy(settings: Settings) -> Policy:
    return Policy(tiny(), settings, "sha256:test")


def rewards(policy: Policy) -> list[float]:
    rows = [Row(example.prompt, example.completion) for example in (UP, DOWN)]
    with torch.no_grad():
        ours = sequence_logprobs(policy.model, rows)
        with policy.reference():
            return (ours - sequence_logprobs(policy.model, rows)).tolist()


def test_ups_become_likelier_and_downs_less_likely(policy: Policy, settings: Settings) -> None:
    trainer = Trainer(policy, settings.learner)
    for _ in range(5):
        result = trainer.update([UP, DOWN])
    up, down = rewards(policy)
    assert up > 0.1
    assert down < -0.1
    assert isinstance(result, Updated)
    assert result.diagnostics.margin > 0
    assert result.diagnostics.loss < 0.5
    assert result.tokens == 11


def test_the_order_and_the_bucketing_of_a_batch_change_nothing(
    policy: Policy, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [UP, DOWN, Example("f3", [5], [6], False)]
    Trainer(policy, settings.learner).update(batch)
    once = policy.weights()
    policy.start(None)
    monkeypatch.setattr("learner.trainer.buckets", lambda rows: [[i] for i in range(len(rows))])
    Trainer(policy, settings.learner).update(batch[::-1])
    for name, weights in policy.weights().items():
        assert torch.allclose(weights, once[name], atol=1e-5), name


def test_log_probs_that_are_no_numbers_are_refused_before_a_weight_moves(
    policy: Policy, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = policy.weights()
    plain = sequence_logprobs
    monkeypatch.setattr(
        "learner.trainer.sequence_logprobs",
        lambda model, rows: torch.stack([v * float("nan") if r.completion[0] == 7 else v
                                         for v, r in zip(plain(model, rows), rows, strict=True)]),
    )  # fmt: skip
    result = Trainer(policy, settings.learner).update([UP, DOWN])
    assert result == Refused(["f2"])
    assert all(torch.equal(before[name], weights) for name, weights in policy.weights().items())


def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened(policy: Policy, settings: Settings) -> None:
    trainer = Trainer(policy, settings.learner)
    trainer.update([UP, DOWN])
    weights, state = policy.weights(), trainer.state()
    file = io.BytesIO()
    torch.save(state, file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    trainer.update([UP, DOWN])
    expected = policy.weights()
    policy.set_weights(weights)
    again = Trainer(policy, settings.learner)
    again.restore(state)
    again.update([UP, DOWN])
    assert all(torch.equal(expected[name], w) for name, w in policy.weights().items())
