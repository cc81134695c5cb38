"""One update over a recorded log: every algorithm, what it says, and what it leaves alone."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from learner.algorithms import ALGORITHMS
from learner.once import NothingLearned, learn
from learner.table import FIGURES, as_json, of_outcome
from tests.learner import recorded
from tests.learner.conftest import respond, vote
from tests.learner.recorded import configured, contents, spoil
from tests.learner.traffic import append, fill, prompt_of
from thumbwheel.errors import LogError, SettingsError
from thumbwheel.events import Choice
from thumbwheel.log import SqliteLog
from thumbwheel.settings import EngineSettings, Settings

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "log.sqlite"
    recorded.record(path, Settings(engine=EngineSettings(model=tiny_dir)))
    return path


@pytest.fixture
def log(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "recorded.sqlite"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_makes_an_update_and_leaves_nothing_behind(
    name: str, settings: Settings, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    spoil(log)
    before = contents(log)
    outcome = learn(configured(settings, algorithm=name), str(log))
    assert contents(log) == before
    assert list(scratch.iterdir()) == []
    assert not settings.data.exists()
    assert outcome.unreadable == 3
    assert outcome.ups + outcome.downs + outcome.pairs + len(outcome.left_out) == 4
    assert outcome.pairs == (4 if name == "dpo" else 0)
    assert outcome.grad_norm > 0
    assert 0 < outcome.kl.mean < outcome.kl.upper  # the weights moved
    assert outcome.kl.n >= 8
    assert (outcome.reward is not None) == ALGORITHMS[name].needs.fresh
    assert set(outcome.figures) <= set(FIGURES)
    assert json.loads(as_json(outcome))["figures"].keys() == outcome.figures.keys()
    text = of_outcome(outcome)
    for figure in outcome.figures:
        assert figure in text


def test_the_same_log_gives_the_same_update(settings: Settings, log: Path) -> None:
    first, second = (learn(configured(settings, algorithm="grpo"), str(log)) for _ in range(2))
    assert first.figures == second.figures
    assert first.kl == second.kl


def test_a_policy_that_moves_too_far_is_said_to_be_outside_of_the_budget(settings: Settings, log: Path) -> None:
    outcome = learn(configured(settings, kl_budget=1e-6), str(log))
    assert not outcome.kl.inside
    assert json.loads(as_json(outcome))["kl"]["inside"] is False
    assert "outside of the budget" in of_outcome(outcome)


def test_the_batch_is_the_first_that_a_learner_would_take(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "skewed.sqlite"
    log = SqliteLog(path)
    fill(log, 120, ups=6)
    log.close()
    outcome = learn(configured(settings, batch=12), str(path))
    assert (outcome.ups, outcome.downs) == (2, 10)


def test_examples_that_an_algorithm_leaves_out_are_named(settings: Settings, log: Path) -> None:
    events = SqliteLog(log)
    unlikely = Choice(index=0, finish_reason="stop", token_ids=[4, 5, 1], logprobs=[-30.0, -30.0, -30.0])
    append(events, respond("odd", [3, 4, 5, 6], choices=[unlikely]), vote("f-odd", "odd", "up", time=-1.0))
    events.close()
    outcome = learn(configured(settings, algorithm="ppo-logged"), str(log))
    (left_out,) = outcome.left_out
    assert left_out.feedback_ids == ["f-odd"]
    assert "other probabilities" in left_out.why
    assert left_out.why in of_outcome(outcome).replace("\n", " ")


def test_a_batch_that_is_refused_says_why_for_each_example(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "wrong.sqlite"
    log = SqliteLog(path)
    sure = Choice(index=0, finish_reason="stop", token_ids=[4, 5, 1], logprobs=[-1e-9, -1e-9, -1e-9])
    append(log, *(respond(f"r{i}", prompt_of(i), choices=[sure]) for i in range(120)))
    append(log, *(vote(f"f{i}", f"r{i}", "up" if i % 2 else "down") for i in range(120)))
    log.close()
    with pytest.raises(NothingLearned, match=r"(?s)have not both thumbs.*f\d+: the policy gives") as raised:
        learn(configured(settings, algorithm="ppo-logged"), str(path))
    assert raised.value.exit_code == 6


def test_votes_that_teach_no_reward_end_it_with_the_figures(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "random.sqlite"
    log = SqliteLog(path)
    fill(log, 200)
    log.close()
    with pytest.raises(NothingLearned, match=r"no reward model, and ppo needs one.*% of cases"):
        learn(configured(settings, algorithm="ppo"), str(path))


def test_missing_data_is_named_before_the_model_is_read(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "short.sqlite"
    log = SqliteLog(path)
    fill(log, 9)
    log.close()
    model = tmp_path / "config alone"
    model.mkdir()
    shutil.copy(settings.engine.model / "config.json", model)
    bare = configured(settings.model_copy(update={"engine": EngineSettings(model=model)}), algorithm="dpo", batch=16)
    with pytest.raises(NothingLearned, match=r"dpo cannot learn.*of 8 held-out prompts.*0 of 16 pairs: corrections"):
        learn(bare, str(path))


def test_an_unknown_algorithm_is_refused_with_those_there_are(settings: Settings, log: Path) -> None:
    with pytest.raises(SettingsError, match="'sft'; there are kto, bco, dpo, ppo, ppo-logged, grpo, gspo"):
        learn(configured(settings, algorithm="sft"), str(log))


def test_a_log_that_is_not_there_is_not_made(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no such file"):
        learn(configured(settings), str(tmp_path / "none.sqlite"))
    assert not (tmp_path / "none.sqlite").exists()
