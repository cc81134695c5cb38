"""The adapter learns, the reference stays, and what is saved is what vLLM loads."""

import json
from pathlib import Path

import pytest
import torch

from learner.logprobs import Row, sequence_logprobs
from learner.policy import Policy
from tests.learner.conftest import VOCABULARY, move, tiny
from thumbwheel.errors import AdapterError, SettingsError
from thumbwheel.manifest import KLBound, LearnedFrom, Manifest
from thumbwheel.settings import EngineSettings, LearnerSettings, Settings
from thumbwheel.store import Adapter, AdapterStore, fingerprint

ROW = [Row([2, 3], [4, 5, 6])]


def score(policy: Policy) -> float:
    with torch.no_grad():
        return sequence_logprobs(policy.model, ROW).item()


def stored(policy: Policy, root: Path, base_model: str = "sha256:test") -> Adapter:
    manifest = Manifest(
        version="v1",
        base_model=base_model,
        created=0.0,
        algorithm="kto",
        learned_from=LearnedFrom(ups=0, downs=0, feedback_ids=[]),
        kl=KLBound(mean=0, upper=0, per_token=0, n=2, budget=1),
        probes=[],
    )
    return AdapterStore(root).write("v1", manifest, policy.save)


@pytest.fixture
def policy(settings: Settings) -> Policy:
    return Policy(tiny(), settings, "sha256:test")


def test_a_new_adapter_changes_nothing_and_the_reference_never_moves(policy: Policy) -> None:
    base = score(policy)
    assert base == pytest.approx(sequence_logprobs(tiny(), ROW).item(), abs=1e-5)
    move(policy, 0.3)
    assert abs(score(policy) - base) > 0.01
    with policy.reference():
        assert score(policy) == base


def test_the_adapter_alone_is_trained_in_fp32_even_on_a_bf16_base(settings: Settings) -> None:
    policy = Policy(tiny(torch.bfloat16), settings, "sha256:test")
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert len(policy.parameters()) == 2 * 2 * 2  # A and B of two modules in two layers
    assert sum(p.requires_grad for p in policy.model.parameters()) == len(policy.parameters())


def test_scale_zero_is_the_reference_and_the_scale_multiplies_the_change(policy: Policy) -> None:
    base = score(policy)
    move(policy, 1e-3)
    trained = policy.weights()
    whole = score(policy) - base
    policy.set_weights(trained, 0.5)
    assert score(policy) - base == pytest.approx(whole / 2, rel=0.05)
    policy.set_weights(trained, 0.0)
    assert score(policy) == base


def test_what_is_saved_is_loaded_again(policy: Policy, settings: Settings, tmp_path: Path) -> None:
    move(policy, 0.3)
    adapter = stored(policy, tmp_path / "adapters")
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert str(tmp_path) not in json.dumps(config)
    again = Policy(tiny(), settings, "sha256:test")
    again.start(adapter)
    assert score(again) == pytest.approx(score(policy), abs=1e-6)
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert again.weights().keys() == policy.weights().keys()


def test_starting_from_base_again_forgets_what_was_trained(policy: Policy) -> None:
    base = score(policy)
    move(policy, 0.3)
    policy.start(None)
    assert score(policy) == base
    assert len(policy.parameters()) == 8


def test_an_adapter_of_another_base_model_is_refused(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="was trained on the base model sha256:other"):
        policy.start(stored(policy, tmp_path / "adapters", "sha256:other"))


def test_weights_of_another_shape_are_refused(policy: Policy, settings: Settings) -> None:
    other = settings.model_copy(update={"learner": settings.learner.model_copy(update={"rank": 1})})
    with pytest.raises(AdapterError, match="rank or target_modules"):
        policy.set_weights(Policy(tiny(), other, "sha256:test").weights())


def test_modules_that_the_model_does_not_have_are_a_clear_error(settings: Settings) -> None:
    learner = LearnerSettings(target_modules=["no_proj"])
    with pytest.raises(SettingsError, match="target_modules"):
        Policy(tiny(), settings.model_copy(update={"learner": learner}), "sha256:test")


def test_a_model_that_cannot_be_read_is_a_clear_error(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    engine = settings.engine.model_copy(update={"model": tmp_path / "nothing"})
    with pytest.raises(SettingsError, match="cannot load the base model"):
        Policy.load(settings.model_copy(update={"engine": engine}))


def test_the_models_path_is_relative_to_the_data_directory(settings: Settings, tiny_dir: Path) -> None:
    moved = settings.model_copy(
        update={"data": tiny_dir.parent, "engine": settings.engine.model_copy(update={"model": Path(tiny_dir.name)})}
    )
    assert Policy.load(moved).base_fingerprint == fingerprint(tiny_dir)


def test_an_answer_ends_with_the_models_own_end_token_or_a_chosen_one(settings: Settings) -> None:
    chosen = settings.model_copy(update={"engine": EngineSettings(stop_token_ids=[3])})
    assert Policy(tiny(), chosen, "sha256:test").stop == {1, 3}
    strange = settings.model_copy(update={"engine": EngineSettings(stop_token_ids=[VOCABULARY])})
    with pytest.raises(SettingsError, match=rf"stop_token_ids: the model has {VOCABULARY} tokens"):
        Policy(tiny(), strange, "sha256:test")
