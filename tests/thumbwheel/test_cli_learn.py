"""`thumbwheel learn` as a person runs it: its options, its two outputs and its exit codes."""

import json
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from learner import daemon
from learner.algorithms import ALGORITHMS
from learner.policy import Policy
from tests import kafka
from tests.learner import recorded
from tests.learner.conftest import tiny
from tests.learner.recorded import contents, spoil
from tests.learner.traffic import fill
from thumbwheel.cli import cli, main
from thumbwheel.events import FEEDBACK
from thumbwheel.log import Message, SqliteLog, open_log
from thumbwheel.log.copy import ALL
from thumbwheel.settings import EngineSettings, Settings

pytestmark = pytest.mark.slow

SETTINGS = """
data = "{data}"
[engine]
model = "{model}"
[learner]
batch = 4
target_modules = ["o_proj", "down_proj"]
max_tokens = 8
kl_samples = 16
threads = 1
[learner.reward]
votes = 120
learning_rate = 2e-2
epochs = 2
batch = 8
samples = 8
"""


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "log.sqlite"
    recorded.record(path, Settings(engine=EngineSettings(model=model)))
    return path


@pytest.fixture
def log(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "recorded.sqlite"))


@pytest.fixture
def run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """The command line in this process; what a signal does is put back."""
    config = tmp_path / "thumbwheel.toml"
    config.write_text(SETTINGS.format(data=tmp_path / "state", model=model))

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["thumbwheel", "--config", str(config), "learn", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_gives_one_object_and_nothing_else(name: str, run: Run, log: Path, tmp_path: Path) -> None:
    spoil(log)
    before = contents(log)
    done = run("--algorithm", name, "--from", str(log), "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["algorithm"] == name
    assert found["figures"]["loss"] is not None
    assert found["unreadable"] == 3
    assert found["kl"]["upper"] > found["kl"]["mean"] > 0
    assert (found["reward"] is None) == (name not in ("ppo", "grpo", "gspo"))
    assert contents(log) == before
    assert not (tmp_path / "state").exists()


def test_the_table_is_on_standard_output_and_says_what_a_figure_means(run: Run, log: Path) -> None:
    done = run("--algorithm", "gspo", "--from", str(log))
    assert (done.code, done.stderr) == (0, "")
    for words in (
        "one update by gspo",
        "flat",
        "gradient norm",
        "tokens/s",
        "GiB",
        "AUC",
        "KL to the reference",
        "budget",
    ):
        assert words in done.stdout, words
    assert "\x1b" not in done.stdout


def test_a_dry_run_says_what_there_is_and_ends_with_0_where_an_update_could_be_made(run: Run, log: Path) -> None:
    spoil(log)
    before = contents(log)
    done = run("--from", str(log), "--dry-run")
    assert done.code == 0, done.stderr
    assert [name in done.stdout for name in ALGORITHMS] == [True] * len(ALGORITHMS)
    assert "records: unreadable" in done.stdout
    assert json.loads(run("--from", str(log), "--dry-run", "--json").stdout)["ready"] is True
    assert contents(log) == before


def test_what_is_missing_is_named_and_the_exit_code_is_6(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "short.sqlite"
    events = SqliteLog(path)
    fill(events, 120)
    events.commit("learner", FEEDBACK, 7)
    events.close()
    before = contents(path)
    assert run("--from", str(path), "--dry-run").code == 0
    dry = run("--algorithm", "dpo", "--from", str(path), "--dry-run", "--json")
    assert dry.code == 6
    (lack,) = json.loads(dry.stdout)["lacks"]["dpo"]
    assert "0 of 4 pairs" in lack
    wet = run("--algorithm", "dpo", "--from", str(path))
    assert (wet.code, wet.stdout) == (6, "")
    assert lack in wet.stderr
    assert contents(path) == before


def test_no_signal_is_reported_with_its_figures(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "random.sqlite"
    events = SqliteLog(path)
    fill(events, 200)
    events.close()
    done = run("--algorithm", "grpo", "--from", str(path), "--json")
    assert (done.code, done.stdout) == (6, "")
    assert "Chance is 50%" in done.stderr


def test_a_path_that_is_no_log_ends_with_3_and_is_left_as_it_is(run: Run, log: Path, tmp_path: Path) -> None:
    db = sqlite3.connect(log)
    db.execute("PRAGMA user_version = 99")
    db.close()
    (tmp_path / "text").write_text("no log " * 100)
    for path, words in ((tmp_path / "none", "no such file"), (tmp_path / "text", "not a database"), (log, "newer")):
        for form in ([], ["--dry-run"]):
            done = run("--from", str(path), *form)
            assert (done.code, done.stdout) == (3, "")
            assert words in done.stderr
            assert str(path) in done.stderr
            assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_log_stands_for_the_log_of_the_settings(run: Run, log: Path, tmp_path: Path) -> None:
    assert "[log] path" in run("--from", "log").stderr
    (tmp_path / "state").mkdir()
    shutil.copy(log, tmp_path / "state" / "log.sqlite")
    assert run("--from", "log", "--dry-run").code == 0
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["log.sqlite"]


@pytest.mark.kafka
def test_no_position_moves_on_kafka_and_nothing_is_appended(
    run: Run, kafka_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = kafka.on(kafka_address, tmp_path / "state")
    events = open_log(settings)
    fill(events, 120)
    events.append(FEEDBACK, [Message("bad", "r9", 2.5, b"no event")])
    monkeypatch.setenv("THUMBWHEEL_LOG", settings.log.model_dump_json())

    def stand() -> list[tuple[int, ...]]:
        return [
            (*events.ends(topic, n), events.committed("learner", topic, n))
            for topic in ALL
            for n in range(events.partitions(topic))
        ]

    before = stand()
    found = json.loads(run("--from", "log", "--dry-run", "--json").stdout)
    assert (found["records"], found["ready"]) == ({"responses": 120, "feedback": 121}, True)
    assert json.loads(run("--from", "log", "--json").stdout)["unreadable"] == 1
    assert stand() == before
    events.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dry-run",), "--from"),
        (("--json",), "--from"),
        (("--from", "LOG", "--algorithm", "sft"), "there are kto, bco, dpo"),
        (("--from", "LOG", "--algorithm", "sft", "--dry-run"), "there are kto, bco, dpo"),
    ],
)
def test_a_mistake_ends_with_2(arguments: tuple[str, ...], words: str, run: Run, log: Path) -> None:
    done = run(*(str(log) if argument == "LOG" else argument for argument in arguments))
    assert (done.code, done.stdout) == (2, "")
    assert words in done.stderr


def test_several_processes_are_refused(run: Run, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("--from", str(log))
    assert done.code == 2
    assert "torchrun" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_good_order(
    number: signal.Signals, run: Run, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def load(settings: Settings) -> Any:
        assert list(scratch.iterdir())
        signal.raise_signal(number)

    monkeypatch.setattr(Policy, "load", load)
    before = contents(log)
    # A shell without job control lets its background jobs ignore Ctrl-C, and this process with them.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run("--from", str(log))
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert (done.code, done.stdout) == (130, "")
    assert "the log is as it was" in done.stderr
    assert list(scratch.iterdir()) == []
    assert contents(log) == before


def test_without_a_log_the_daemon_runs_with_the_algorithm_that_was_named(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(daemon, "run", lambda settings: ran.append(settings.learner.algorithm))
    assert run("--algorithm", "bco").code == 0
    assert run().code == 0
    assert ran == ["bco", "kto"]


def test_the_help_names_every_algorithm() -> None:
    shown = CliRunner().invoke(cli, ["learn", "--help"]).output
    for name in ALGORITHMS:
        assert name in shown
