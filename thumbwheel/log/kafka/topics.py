"""The topics that the log needs: making them, and saying in words what is wrong with those that are there."""

import time
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import TopicAlreadyExistsError

from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT
from thumbwheel.log.deadletter import dlq
from thumbwheel.log.kafka.connection import LETTER_BYTES, MAX_BYTES, Connection
from thumbwheel.settings import Settings

_DAY_MS = 86_400_000
_FOREVER = "-1"


@dataclass(frozen=True)
class Topic:
    """A topic as it should be; `name` is without the prefix."""

    name: str
    partitions: int
    replication: int
    configs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a topic, and how to mend it. `fatal`: events cannot be written, or lose order."""

    topic: str
    words: str
    fatal: bool


def wanted(settings: Settings) -> list[Topic]:
    """Every topic. Responses and feedback have the same number of partitions, so that equal keys lie in equal ones;
    the rollout has one, since its fold takes an order of all."""
    kafka = settings.log.kafka
    common = {
        "min.insync.replicas": str(kafka.min_insync_replicas),
        "max.message.bytes": str(MAX_BYTES),
        "cleanup.policy": "delete",
        # An event is as old as it says: a copied log keeps its times, and a clock that is ahead stops nothing.
        "message.timestamp.type": "CreateTime",
        "message.timestamp.after.max.ms": str(2**63 - 1),
    }
    retention = {
        RESPONSES: str(int(kafka.response_retention_days * _DAY_MS)),
        FEEDBACK: str(int(kafka.feedback_retention_days * _DAY_MS)),
        ROLLOUT: _FOREVER,
    }
    topics = []
    for name, kept in retention.items():
        partitions = 1 if name == ROLLOUT else kafka.partitions
        topics.append(Topic(name, partitions, kafka.replication, common | {"retention.ms": kept}))
        letters = {"retention.ms": _FOREVER, "max.message.bytes": str(LETTER_BYTES)}
        topics.append(Topic(dlq(name), 1, kafka.replication, common | letters))
    return topics


def make(settings: Settings) -> list[str]:
    """Make the topics that are missing; returns their names. Topics that are there stay as they are (see `check`).

    Raises LogError where the cluster cannot be reached, or has too few brokers for `[log.kafka] replication`.
    """
    connection = Connection(settings)
    admin = connection.admin()
    try:
        while True:
            with connection.errors("make topics in"):
                try:
                    return _make_missing(settings, connection, admin)
                except TopicAlreadyExistsError:  # somebody else makes them at the same time
                    time.sleep(0.1)
    finally:
        admin.close()


def _make_missing(settings: Settings, connection: Connection, admin: KafkaAdminClient) -> list[str]:
    there = set(admin.list_topics())
    missing = {
        connection.name(topic.name): {
            "num_partitions": topic.partitions,
            "replication_factor": topic.replication,
            "configs": topic.configs,
        }
        for topic in wanted(settings)
        if connection.name(topic.name) not in there
    }
    if not missing:
        return []
    brokers, replication = len(admin.describe_cluster()["brokers"]), settings.log.kafka.replication
    if replication > brokers:
        raise LogError(
            f"[log.kafka] replication is {replication}, but the cluster has {brokers} broker(s): start more, or set "
            "replication (and min_insync_replicas) lower and live with what a dead broker takes"
        )
    admin.create_topics(missing, wait_for_metadata=True)
    return list(missing)


def check(settings: Settings) -> list[Problem]:
    """What is wrong with the topics as they are. Raises LogError where the cluster cannot be asked."""
    connection = Connection(settings)
    admin = connection.admin()
    try:
        with connection.errors("ask"):
            topics = wanted(settings)
            described = {topic["name"]: topic for topic in admin.describe_topics()}
            present = [topic for topic in topics if connection.name(topic.name) in described]
            resources = [ConfigResource(ConfigResourceType.TOPIC, connection.name(topic.name)) for topic in present]
            configs = admin.describe_configs(resources, config_filter="all") if resources else {}
    finally:
        admin.close()
    problems = [
        Problem(connection.name(topic.name), "is missing: make it with `thumbwheel log init`", True)
        for topic in topics
        if topic not in present
    ]
    counts = {topic.name: len(described[connection.name(topic.name)]["partitions"]) for topic in present}
    if RESPONSES in counts and FEEDBACK in counts and counts[RESPONSES] != counts[FEEDBACK]:
        problems.append(
            Problem(
                connection.name(FEEDBACK),
                f"has {counts[FEEDBACK]} partitions and {connection.name(RESPONSES)} has {counts[RESPONSES]}: give the "
                "smaller one as many as the other, with kafka-topics.sh --alter",
                False,
            )
        )
    for topic in present:
        name = connection.name(topic.name)
        problems += _partitions(settings, topic, name, described[name]["partitions"])
        problems += _configs(topic, name, configs["topic"][name])
    return problems


def _partitions(settings: Settings, topic: Topic, name: str, partitions: list[dict[str, Any]]) -> list[Problem]:
    """What is wrong with how a topic is spread over the brokers."""
    problems = []
    if topic.partitions == 1 and len(partitions) != 1:
        words = f"has {len(partitions)} partitions and has to have one, or its events have no order: make it anew"
        problems.append(Problem(name, words, True))
    copies = min(len(partition["replica_nodes"]) for partition in partitions)
    if copies < topic.replication:
        words = (
            f"has {copies} replica(s), [log.kafka] replication says {topic.replication}: add some with "
            "kafka-reassign-partitions.sh, or say in the settings what you want"
        )
        problems.append(Problem(name, words, False))
    for partition in partitions:
        index, alive = partition["partition_index"], len(partition["isr_nodes"])
        if partition["leader_id"] < 0:
            problems.append(Problem(name, f"partition {index} has no leader: its brokers are down, start them", True))
        elif alive < settings.log.kafka.min_insync_replicas:
            words = f"partition {index} has {alive} replica(s) in sync and takes no message below "
            words += f"{settings.log.kafka.min_insync_replicas} (min.insync.replicas): start the brokers that are down"
            problems.append(Problem(name, words, True))
        elif alive < len(partition["replica_nodes"]):
            words = f"partition {index} has {alive} of {len(partition['replica_nodes'])} replicas in sync: "
            problems.append(Problem(name, words + "a broker is down or behind", False))
    return problems


def _configs(topic: Topic, name: str, found: dict[str, dict[str, Any]]) -> list[Problem]:
    """Which of a topic's settings would lose or refuse events."""
    problems = []
    for key, value in topic.configs.items():
        seen = str(found[key]["value"])
        mend = f"kafka-configs.sh --alter --entity-type topics --entity-name {name} --add-config {key}={value}"
        if key in ("min.insync.replicas", "max.message.bytes", "message.timestamp.after.max.ms"):
            wrong = int(seen) < int(value)
        elif key == "retention.ms":
            wrong = int(seen) >= 0 and (int(value) < 0 or int(seen) < int(value))
        else:
            wrong = value not in seen.split(",") or "compact" in seen
        if wrong:
            problems.append(Problem(name, f"has {key}={seen} and should have {value}: {mend}", key == "cleanup.policy"))
    return problems
