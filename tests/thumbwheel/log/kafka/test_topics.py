"""The topics: made once and left alone, and whatever is wrong with them is found, with the way to mend it."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from tests import kafka
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT
from thumbwheel.log import Message, deadletter
from thumbwheel.log.kafka.connection import MAX_BYTES, Connection
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.log.kafka.topics import Problem, check, make, wanted
from thumbwheel.settings import Settings

pytestmark = pytest.mark.kafka


@pytest.fixture
def settings(kafka_address: str, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path, log=kafka.kafka(kafka_address, timeout_s=15.0))


@pytest.fixture
def admin(settings: Settings) -> Any:
    client = Connection(settings).admin()
    yield client
    client.close()


def alter(admin: KafkaAdminClient, name: str, **configs: str) -> None:
    values = {key.replace("_", "."): value for key, value in configs.items()}
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, values)])


def found(settings: Settings, count: int) -> list[Problem]:
    """The problems, once there are so many: the broker takes a moment to know what the controller has decided."""
    deadline = time.monotonic() + 5
    while len(problems := check(settings)) != count and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(problems) == count, problems
    return problems


def test_topics_are_made_once_as_they_are_wanted(settings: Settings, admin: KafkaAdminClient) -> None:
    names = [settings.log.kafka.prefix + topic.name for topic in wanted(settings)]
    assert [problem.topic for problem in check(settings)] == names
    assert all(problem.fatal and "`thumbwheel log init`" in problem.words for problem in check(settings))
    assert make(settings) == names
    assert make(settings) == []
    assert check(settings) == []
    counts = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(names)}
    assert counts == {name: 3 if name.endswith((RESPONSES, FEEDBACK)) else 1 for name in names}


def test_what_is_missing_is_made_and_what_is_there_stays(settings: Settings, admin: KafkaAdminClient) -> None:
    name = settings.log.kafka.prefix + ROLLOUT
    admin.create_topics({name: {"num_partitions": 1, "replication_factor": 1, "configs": {"retention.ms": "1234567"}}})
    made = make(settings)
    assert name not in made
    assert len(made) == 5
    problems = found(settings, 3)
    assert {problem.topic for problem in problems} == {name}
    assert any("retention.ms=1234567" in problem.words for problem in problems)


def test_two_that_make_them_at_once_are_both_content(settings: Settings) -> None:
    with ThreadPoolExecutor() as pool:
        made = [attempt.result() for attempt in [pool.submit(make, settings) for _ in range(3)]]
    assert {name for names in made for name in names} == {
        settings.log.kafka.prefix + topic.name for topic in wanted(settings)
    }
    found(settings, 0)


def test_a_message_of_nearly_the_largest_size_fits(settings: Settings) -> None:
    make(settings)
    log = KafkaLog(settings)
    value = bytes(MAX_BYTES - 1000)
    log.append(ROLLOUT, [Message("big", "k", 1.0, value)])
    (record,) = log.read(ROLLOUT, 0)
    assert len(record.message.value) == len(value)
    deadletter.send(log, record, "group", ValueError("why " * 1000))  # the letter is larger still
    (letter,) = deadletter.letters(log, ROLLOUT)
    assert letter.original.value == value
    log.close()


def test_more_replicas_than_brokers_are_refused_by_name(settings: Settings) -> None:
    values = settings.log.kafka.model_copy(update={"replication": 3})
    more = Settings(data=settings.data, log=settings.log.model_copy(update={"kafka": values}))
    with pytest.raises(LogError, match=r"\[log.kafka\] replication is 3, but the cluster has 1 broker"):
        make(more)
    assert all("is missing" in problem.words for problem in check(settings))


@pytest.mark.parametrize(
    ("topic", "configs", "words", "fatal"),
    [
        (RESPONSES, {"retention_ms": "1000"}, "retention.ms=1000", False),
        (ROLLOUT, {"retention_ms": "1000"}, "retention.ms=1000", False),
        (ROLLOUT, {"cleanup_policy": "compact"}, "cleanup.policy=compact", True),
        (ROLLOUT, {"cleanup_policy": "compact,delete"}, "cleanup.policy=compact,delete", True),
        (FEEDBACK, {"max_message_bytes": "1000000"}, "max.message.bytes=1000000", False),
        (FEEDBACK, {"message_timestamp_type": "LogAppendTime"}, "message.timestamp.type=LogAppendTime", False),
    ],
)
def test_settings_of_a_topic_that_lose_or_refuse_events_are_found_and_can_be_mended(
    settings: Settings, admin: KafkaAdminClient, topic: str, configs: dict[str, str], words: str, fatal: bool
) -> None:
    make(settings)
    name = settings.log.kafka.prefix + topic
    alter(admin, name, **configs)
    (problem,) = found(settings, 1)
    assert problem.topic == name
    assert problem.fatal is fatal
    assert words in problem.words
    command, _, change = problem.words.partition("--add-config ")
    assert f"kafka-configs.sh --alter --entity-type topics --entity-name {name}" in command
    key, _, value = change.partition("=")
    alter(admin, name, **{key.replace(".", "_"): value})
    found(settings, 0)


def test_what_keeps_longer_than_it_has_to_is_no_problem(settings: Settings, admin: KafkaAdminClient) -> None:
    make(settings)
    alter(admin, settings.log.kafka.prefix + RESPONSES, retention_ms="-1", min_insync_replicas="2")
    assert check(settings) == []


def test_topics_that_are_spread_otherwise_than_they_should_be(settings: Settings, admin: KafkaAdminClient) -> None:
    prefix = settings.log.kafka.prefix
    make(settings)
    admin.create_partitions({prefix + ROLLOUT: 3})
    admin.create_partitions({prefix + FEEDBACK: 5})
    rollout, feedback = sorted(found(settings, 2), key=lambda problem: problem.topic, reverse=True)
    assert (rollout.topic, rollout.fatal) == (prefix + ROLLOUT, True)
    assert "has 3 partitions and has to have one" in rollout.words
    assert (feedback.topic, feedback.fatal) == (prefix + FEEDBACK, False)
    assert f"has 5 partitions and {prefix}{RESPONSES} has 3" in feedback.words
    assert "kafka-topics.sh --alter" in feedback.words


def test_too_few_replicas_are_found(settings: Settings) -> None:
    make(settings)
    values = settings.log.kafka.model_copy(update={"replication": 3, "min_insync_replicas": 2})
    problems = check(Settings(data=settings.data, log=settings.log.model_copy(update={"kafka": values})))
    about = [problem for problem in problems if problem.topic.endswith(ROLLOUT)]
    words = " / ".join(problem.words for problem in about)
    assert "has 1 replica(s), [log.kafka] replication says 3" in words
    assert "partition 0 has 1 replica(s) in sync" in words
    assert "min.insync.replicas=1 and should have 2" in words
