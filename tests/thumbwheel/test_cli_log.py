"""The commands of `thumbwheel log` that end by themselves, run as a person runs them, on both logs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests import kafka
from tests.thumbwheel.command import configure, run
from tests.thumbwheel.samples import EVERY, dead, put, response, vote
from tests.thumbwheel.test_rollout import reported, submitted
from thumbwheel.cli import cli
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT, TOPICS
from thumbwheel.log import Log, Message, SqliteLog
from thumbwheel.log.copy import ALL
from thumbwheel.log.kafka.topics import make
from thumbwheel.settings import load

pytestmark = pytest.mark.slow


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- init --------------------------------------------------------------------------------------------------------


def test_init_makes_the_file_and_the_second_time_finds_it(tmp_path: Path) -> None:
    config = configure(tmp_path)
    assert lines(run(config, "log", "init", "--json"))[0]["made"] is True
    assert (tmp_path / "log.sqlite").is_file()
    again = run(config, "log", "init")
    assert (again.returncode, again.stdout.split()) == (0, ["there", str(tmp_path / "log.sqlite")])


@pytest.mark.kafka
def test_init_makes_the_topics_and_the_second_time_finds_them(kafka_address: str, tmp_path: Path) -> None:
    config = configure(tmp_path, kafka.kafka(kafka_address))
    prefix = load(config).log.kafka.prefix
    first = run(config, "log", "init")
    assert first.returncode == 0, first.stderr
    assert sorted(first.stdout.splitlines()) == sorted(f"made   {prefix}{topic}" for topic in ALL)
    (again,) = lines(run(config, "log", "init", "--json"))
    assert again == {"backend": "kafka", "made": [], "there": again["there"], "problems": []}
    assert again["there"] == [line.split()[1] for line in first.stdout.splitlines()]


@pytest.mark.kafka
def test_init_says_what_is_wrong_with_the_topics_that_are_there(kafka_address: str, tmp_path: Path) -> None:
    values = kafka.kafka(kafka_address)
    assert run(configure(tmp_path, values), "log", "init").returncode == 0
    values["kafka"]["min_insync_replicas"] = 2
    done = run(configure(tmp_path, values), "log", "init")
    assert done.returncode == 3
    assert "min.insync.replicas" in done.stderr
    values["kafka"]["min_insync_replicas"] = 1
    values["kafka"]["response_retention_days"] = 1e6
    done = run(configure(tmp_path, values), "log", "init")
    assert done.returncode == 0
    assert ["retention.ms" in line for line in done.stderr.splitlines()] == [True]


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [("adapters", "list"), ("log", "read"), ("log", "tail"), ("log", "dlq", "list"), ("log", "init"), ("log", "copy")],
    ids=" ".join,
)
def test_a_wrong_address_is_named_with_its_setting(arguments: tuple[str, ...], tmp_path: Path) -> None:
    config = configure(tmp_path, kafka.kafka("127.0.0.1:1", timeout_s=1.0))
    (tmp_path / "log.sqlite").touch()
    done = run(config, *arguments, *(["sqlite", "kafka"] if "copy" in arguments else []))
    assert done.returncode == 3, done.stderr
    assert '[log.kafka] bootstrap = "127.0.0.1:1"' in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_address_without_a_port_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    done = run(configure(tmp_path, kafka.kafka("localhost:kafka")), "adapters", "list")
    assert done.returncode == 2
    assert "[log.kafka] bootstrap" in done.stderr
    assert "localhost:kafka" in done.stderr


@pytest.mark.kafka
@pytest.mark.parametrize("arguments", [("adapters", "list"), ("log", "read", FEEDBACK), ("log", "dlq", "list")])
def test_a_missing_topic_is_named_with_the_command_that_makes_it(
    arguments: tuple[str, ...], kafka_address: str, tmp_path: Path
) -> None:
    config = configure(tmp_path, kafka.kafka(kafka_address))
    done = run(config, *arguments)
    assert done.returncode == 3
    assert load(config).log.kafka.prefix in done.stderr
    assert "[log.kafka] prefix" in done.stderr
    assert "thumbwheel log init" in done.stderr


@pytest.mark.kafka
def test_more_replicas_than_brokers_are_refused_and_nothing_is_made(kafka_address: str, tmp_path: Path) -> None:
    config = configure(tmp_path, kafka.kafka(kafka_address, replication=3))
    done = run(config, "log", "init")
    assert done.returncode == 3
    assert "[log.kafka] replication is 3" in done.stderr
    assert run(config, "adapters", "list").returncode == 3


@pytest.mark.parametrize("arguments", [("adapters", "list"), ("log", "read"), ("log", "tail"), ("log", "init")])
def test_a_file_that_is_no_log_is_named_with_its_setting(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "log.sqlite").write_bytes(b"no database, however long one looks at it" * 100)
    done = run(configure(tmp_path), *arguments)
    assert done.returncode == 3
    assert "[log] path" in done.stderr
    assert str(tmp_path / "log.sqlite") in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("read", "nothing"), FEEDBACK),
        (("tail", "nothing"), FEEDBACK),
        (("dlq", "list", "nothing"), FEEDBACK),
        (("tail", "--since", "yesterday"), "10m"),
        (("tail", "--since", "1h", "--from-start"), "--since"),
        (("tail", "--type", "feedback"), "feedback.submitted"),
        (("tail", "--limit", "0"), "--limit"),
        (("dlq", "show", "abc"), "abc"),
        (("dlq", "replay", "abc"), "abc"),
        (("dlq", "replay"), "--all"),
        (("copy", "sqlite", "sqlite"), "nothing to copy"),
        (("copy", "sqlite", "postgres"), "postgres"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_in_a_command_is_named(arguments: tuple[str, ...], word: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["--config", str(configure(tmp_path)), "log", *arguments])
    assert done.exit_code == 2, done.output
    assert word in done.stderr


def test_a_partition_that_is_not_there_is_named(config: Path) -> None:
    done = run(config, "log", "read", FEEDBACK, "--partition", "7")
    assert done.returncode == 3
    assert "7" in done.stderr


def test_a_copy_of_a_file_that_is_not_there_makes_none(tmp_path: Path) -> None:
    done = run(configure(tmp_path, kafka.kafka("127.0.0.1:1")), "log", "copy", "sqlite", "kafka")
    assert done.returncode == 3
    assert "[log] path" in done.stderr
    assert not (tmp_path / "log.sqlite").exists()


# --- reading -----------------------------------------------------------------------------------------------------


def test_read_says_where_everything_lies(config: Path, log: Log) -> None:
    put(log, *(vote(f"r{i}") for i in range(30)))
    seen = lines(run(config, "log", "read", FEEDBACK, "--json"))
    assert {one["response_id"] for one in seen} == {f"r{i}" for i in range(30)}
    (overview,) = lines(run(config, "log", "read", "--json"))
    assert set(overview) == set(ALL)
    partitions = overview[FEEDBACK]
    assert isinstance(partitions, list)
    assert len(partitions) == log.partitions(FEEDBACK)
    places = [(one["partition"], one["offset"]) for one in seen]
    assert places == [(one["partition"], i) for one in partitions for i in range(one["first"], one["next"])]
    last = partitions[-1]["partition"]
    later = lines(run(config, "log", "read", FEEDBACK, "--partition", str(last), "--from", "2", "--json"))
    assert [(one["partition"], one["offset"]) for one in later] == [one for one in places if one[0] == last][2:]
    assert f"{FEEDBACK}: 30 records" in run(config, "log", "read").stdout


def test_dead_letters_are_read_and_followed_as_topics_too(config: Path, log: Log) -> None:
    dead(log)
    (read,) = lines(run(config, "log", "read", f"{FEEDBACK}.dlq", "--json"))
    assert read["value"] == "no event"
    shown = run(config, "log", "tail", f"{FEEDBACK}.dlq", "--no-follow")
    assert "learner  ValueError: no" in shown.stdout


def test_decisions_are_taken_on_whatever_log_there_is(config: Path, log: Log) -> None:
    put(log, submitted(), reported("pass"))
    done = run(config, "adapters", "approve", "v1", "--digest", "d1", "--actor", "ann", "--reason", "good", "--json")
    assert done.returncode == 0, done.stderr
    assert '"approved"' in run(config, "adapters", "list", "--json").stdout
    again = run(config, "adapters", "approve", "v1", "--actor", "ann", "--reason", "twice")
    assert again.returncode == 5


def test_tail_merges_the_topics_in_the_order_of_time_and_ends_where_the_log_ends(config: Path, log: Log) -> None:
    put(log, *EVERY[2:], EVERY[1], EVERY[0])
    log.append(FEEDBACK, [Message("bad", "r9", 2.5, b"\x1b[2J no event")])
    done = run(config, "log", "tail", "--no-follow")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        "response.generated",
        "feedback.submitted",
        "UNREADABLE",
        *(event.type for event in EVERY[2:]),  # type: ignore[attr-defined]
    ]
    assert "\x1b" not in done.stdout
    seen = lines(run(config, "log", "tail", ROLLOUT, "--no-follow", "--json"))
    assert {tuple(one)[:3] for one in seen} == {("topic", "partition", "offset")}
    assert len(seen) == 7


SHOWN = {
    ("--key", "r1"): ["r1", "r1", "r1"],
    ("--type", "feedback.submitted"): ["r1", "r2"],
    ("--version", "v2"): ["v2", "v2", "v2", "v2"],
    ("--user", "beef"): ["r2"],
    ("--grep", "GRÖSSTE"): ["r2"],
    ("--limit", "2"): ["r1", "r1"],
    ("--since", "1970-01-01T00:00:06.5Z"): ["v2", "v1", "r1"],
    ("--since", "1h"): [],
    ("--type", "response.generated", "--limit", "5"): ["r1"],
}


def test_tail_shows_what_was_asked_for(config: Path, log: Log) -> None:
    events = [*EVERY[:2], vote("r2", 2.5, "beef01", "das größte"), *EVERY[2:]]
    put(log, *(event for event in events if event.key != "v3"))
    for options, keys in SHOWN.items():
        done = CliRunner().invoke(cli, ["--config", str(config), "log", "tail", "--no-follow", "--json", *options])
        shown = [json.loads(line) for line in done.stdout.splitlines()]
        assert [one.get("response_id") or one.get("replica") or one["version"] for one in shown] == keys, options


# --- moving ------------------------------------------------------------------------------------------------------


@pytest.mark.kafka
def test_a_copy_says_what_it_took_and_takes_only_what_is_new_the_second_time(
    kafka_address: str, tmp_path: Path
) -> None:
    config = configure(tmp_path, kafka.kafka(kafka_address))
    make(load(config))
    origin = SqliteLog(tmp_path / "log.sqlite")
    now = time.time()
    put(
        origin,
        *(response(f"r{i}", now + i) for i in range(300)),
        *(vote(f"r{i}", now + i) for i in range(40)),
        *EVERY[2:],
    )
    dead(origin)
    done = run(config, "log", "copy", "sqlite", "kafka", "--json")
    assert done.returncode == 0, done.stderr
    taken = {one["topic"]: one["read"] for one in json.loads(done.stdout)}
    assert taken == dict.fromkeys(ALL, 0) | {RESPONSES: 300, FEEDBACK: 41, ROLLOUT: 7, f"{FEEDBACK}.dlq": 1}
    put(origin, vote("new", now))
    again = run(config, "log", "copy", "sqlite", "kafka")
    assert [line for line in again.stdout.splitlines() if not line.endswith(": 0 records")] == [
        f"{FEEDBACK}: 1 records"
    ]
    origin.close()
    back = run(config, "log", "copy", "kafka", "sqlite", "--json")
    assert [(one["read"], one["duplicates"]) for one in json.loads(back.stdout) if one["read"]] == [
        (300, 300),
        (42, 42),
        (7, 7),
        (1, 1),
    ]


# --- what is imported --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (["--help"], ["kafka", "pydantic", "rich", "sqlite3"]),
        (["log", "--help"], ["kafka", "pydantic", "rich", "sqlite3"]),
        (["log", "tail", "--help"], ["kafka", "pydantic", "rich", "sqlite3"]),
        (["log", "init"], ["kafka", "rich"]),
        (["log", "tail", "--no-follow"], ["kafka", "rich"]),
        (["log", "dlq", "list"], ["kafka", "rich"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_command_imports_only_what_it_needs(arguments: list[str], without: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from thumbwheel.cli import cli\n"
        f"try: cli({['--config', str(configure(tmp_path)), *arguments]!r})\n"
        f"finally: assert not set({without!r}) & set(sys.modules), set({without!r}) & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr


def test_every_topic_can_be_read_by_its_name() -> None:
    assert set(TOPICS) < set(ALL)
