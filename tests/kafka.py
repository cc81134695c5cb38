"""A real Kafka for the tests, and logs on it that do not see each other."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.unavailable import unavailable
from thumbwheel.demo.broker import Cluster
from thumbwheel.log.kafka import topics
from thumbwheel.settings import Settings

EAGER = {"log.initial.task.delay.ms": "500", "log.retention.check.interval.ms": "500"}
"""What is past its retention goes at once, and not when five minutes happen to be over."""


@contextmanager
def bootstrap(directory: Path) -> Iterator[str]:
    """The address of a cluster: `$THUMBWHEEL_TEST_KAFKA`, else one broker of `$KAFKA_HOME`, started for the tests."""
    if given := os.environ.get("THUMBWHEEL_TEST_KAFKA"):
        yield given
        return
    needs_release()
    with Cluster(directory, extra=EAGER) as cluster:
        yield cluster.bootstrap


def needs_release() -> None:
    """For tests that start brokers of their own."""
    if not os.environ.get("KAFKA_HOME"):
        unavailable("needs Apache Kafka: set KAFKA_HOME to an unpacked release, or THUMBWHEEL_TEST_KAFKA to an address")


def kafka(address: str, **more: Any) -> dict[str, Any]:
    """`[log]` on a cluster, with topics and groups that nobody else has, that keep what is years old."""
    values = {
        "bootstrap": address,
        "prefix": f"t{uuid.uuid4().hex[:10]}.",
        "partitions": 3,
        "replication": 1,
        "min_insync_replicas": 1,
        "member": "m1",
        "session_timeout_s": 6.0,
        "response_retention_days": 1e5,
        "feedback_retention_days": 1e5,
        **more,
    }
    return {"backend": "kafka", "kafka": values}


def on(address: str, data: Path, **more: Any) -> Settings:
    """Settings with a log of their own on a cluster, whose topics are made."""
    settings = Settings(data=data, log=kafka(address, **more))
    topics.make(settings)
    return settings
