"""What a dry run counts, and what it says is missing."""

import json
import os
import shutil
from pathlib import Path

import pytest

from learner.survey import Lengths, kind, survey
from learner.table import as_json, of_survey
from tests.learner import recorded
from tests.learner.conftest import respond, vote
from tests.learner.recorded import configured, contents, spoil
from tests.learner.traffic import append, fill, prompt_of
from thumbwheel.errors import LogError, SettingsError
from thumbwheel.events import Choice, Event
from thumbwheel.log import SqliteLog
from thumbwheel.settings import EngineSettings, Settings

BIG = Choice(index=0, finish_reason="stop", token_ids=[4] * 7, logprobs=[-1.0] * 7)
FOREIGN = [Choice(index=0, finish_reason="stop", token_ids=[id], logprobs=[-1.0]) for id in (77, 88)]


@pytest.fixture
def bare(settings: Settings, tmp_path: Path) -> Settings:
    """With a base model of which nothing but the config is there."""
    model = tmp_path / "config alone"
    model.mkdir()
    shutil.copy(settings.engine.model / "config.json", model)
    return configured(settings.model_copy(update={"engine": EngineSettings(model=model)}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recorded.sqlite"


def write(path: Path, *events: Event) -> None:
    log = SqliteLog(path)
    append(log, *events)
    log.close()


def learnable(count: int) -> list[list[int]]:
    """Prompts that are not held out."""
    from learner.admission import one_tenth

    return [prompt for prompt in map(prompt_of, range(2 * count)) if not one_tenth(prompt)][:count]


def test_it_counts_what_there_is_without_weights_and_changes_nothing(bare: Settings, path: Path) -> None:
    one, two, three, four = learnable(4)
    write(
        path,
        respond("r1", one, choices=[BIG]),
        respond("r2", one, version="v1"),
        respond("r3", two),
        respond("r4", three, untrainable="a tool was called"),
        respond("r5", four, choices=FOREIGN[:1]),
        respond("r6", four, choices=FOREIGN[1:]),
        respond("r7", two, version="v1"),
        respond("r7", two, version="v1", id="again"),
        vote("f1", "r1", "up", user="a"),
        vote("f2", "r2", "down", user="b"),
        vote("f3", "r3", "up", user="a", preferred_over="r1"),
        vote("f3-late", "r3", "up", user="a", time=101.0),
        vote("f4", "r4", "up"),
        vote("f5", "r5", "down"),
        vote("f6", "r6", "down"),
        vote("f8", "never", "down"),
        vote("f9", "r7", None, retracted=True),
    )
    spoil(path)
    before = contents(path)
    found = survey(bare, str(path))
    assert contents(path) == before
    assert found.records == {"responses": 10, "feedback": 10}
    assert sum(found.unreadable.values()) == 3
    assert found.responses == found.answers == 7
    outside = "token id … is outside the vocabulary of …: another base model sampled it"
    assert found.refused == {outside: 2, "marked untrainable: a tool was called": 1}
    assert found.votes == {
        "ready": {"": 3},
        "set_aside": {
            outside: 2,
            "a later vote of its user on this answer took its place": 1,
            "a retraction": 1,
            "marked untrainable: a tool was called": 1,
        },
        "waiting": {"": 1},
    }
    assert (found.ups, found.downs, found.users) == (2, 1, 2)
    assert found.versions == {"base": 2, "v1": 1}
    assert found.pairs == {"votes": 1}
    assert (found.learnable, found.with_logprobs, found.prompts) == (3, 3, 2)
    assert found.prompt_tokens == Lengths(9, 3, 3, 3, 3)
    assert found.answer_tokens == Lengths(13, 3, 7, 7, 7)
    assert not found.ready
    assert json.loads(as_json(found))["versions"] == found.versions
    text = of_survey(found)
    assert "a tool was called" in text
    assert "\x1b[2J" not in text


def test_every_algorithm_is_able_where_nothing_is_missing(settings: Settings, path: Path) -> None:
    recorded.record(path, settings)
    found = survey(configured(settings), str(path))
    assert found.ready
    assert set(found.lacks) == {"kto", "bco", "dpo", "ppo", "ppo-logged", "grpo", "gspo"}
    assert not any(found.lacks.values())
    assert found.pairs["votes"] > 16


def test_what_each_algorithm_lacks_is_named(bare: Settings, path: Path) -> None:
    log = SqliteLog(path)
    fill(log, 120, ups=30)  # 4 ups, on different prompts
    log.close()
    found = survey(configured(bare, algorithm="grpo"), str(path))
    assert found.lacks["kto"] == found.lacks["bco"] == found.lacks["ppo-logged"] == []
    assert found.lacks["dpo"][0].startswith("0 of 4 pairs: corrections")
    (why,) = found.lacks["grpo"]
    assert "more thumbs up" in why
    assert found.lacks["ppo"] == found.lacks["gspo"] == [why]
    assert not found.ready
    assert "more thumbs up" in " ".join(of_survey(found).split())


def test_an_empty_log_lacks_everything(bare: Settings, path: Path) -> None:
    SqliteLog(path).close()
    found = survey(bare, str(path))
    assert (found.ups, found.answers, found.answer_tokens) == (0, 0, Lengths(0, 0, 0, 0, 0))
    assert all(found.lacks.values())
    of_survey(found)


def test_votes_that_may_still_change_are_not_counted(bare: Settings, path: Path) -> None:
    import time

    (prompt,) = learnable(1)
    write(path, respond("r1", prompt), vote("f1", "r1", time=time.time()), vote("f2", "r1", user="b"))
    assert survey(bare, str(path)).ups == 2
    found = survey(configured(bare, settle_s=3600.0), str(path))
    assert (found.ups, found.users, found.learnable) == (1, 1, 1)


def test_the_log_of_the_settings_is_read_by_its_word(bare: Settings, tmp_path: Path) -> None:
    path = bare.path(bare.log.path)
    log = SqliteLog(path)
    fill(log, 5)
    log.close()
    before = contents(path)
    assert survey(bare, "log").responses == 5
    assert contents(path) == before
    with pytest.raises(LogError, match=r"\[log\] path"):
        survey(bare.model_copy(update={"data": tmp_path / "elsewhere"}), "log")


def test_a_log_that_a_gateway_writes_is_read_as_it_is_now(bare: Settings, path: Path) -> None:
    log = SqliteLog(path)
    fill(log, 5)
    assert survey(bare, str(path)).responses == 5
    fill(log, 5, start=5)  # and the writer goes on
    assert survey(bare, str(path)).responses == 10
    log.close()


def test_a_base_model_that_is_not_there_is_named_with_its_setting(bare: Settings, path: Path) -> None:
    SqliteLog(path).close()
    os.remove(bare.engine.model / "config.json")
    with pytest.raises(SettingsError, match=r"\[engine\] model"):
        survey(bare, str(path))


def test_an_unknown_algorithm_is_refused_before_anything_is_read(bare: Settings, path: Path) -> None:
    with pytest.raises(SettingsError, match="there are kto"):
        survey(configured(bare, algorithm="sft"), str(path))


def test_reasons_that_differ_in_numbers_and_quotations_are_one() -> None:
    words = "the tokenizer has changed: the tokens say {!r}, and {!r} was recorded"
    assert kind(words.format("a", 'it "is"')) == kind(words.format("it's", "b"))
    assert kind("a log-prob is 0.25, and none is above 0") == kind("a log-prob is 1e-05, and none is above 0")
    assert kind("marked untrainable: a") != kind("marked untrainable: b")
    assert len(kind("x" * 1000)) == 200
