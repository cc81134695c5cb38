"""Three brokers: what is said when too few of them are left, and what becomes of what was acknowledged."""

import signal
import time
from pathlib import Path

import pytest

from tests.kafka import needs_release, on
from thumbwheel.demo.broker import Cluster
from thumbwheel.errors import LogError
from thumbwheel.events import ROLLOUT
from thumbwheel.log import Message, read_all
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.log.kafka.topics import check

pytestmark = pytest.mark.kafka

PATIENCE_S = 60.0


def refused(log: KafkaLog) -> str:
    """What is said, once it is about replicas: at first a leader may be missing."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with pytest.raises(LogError) as error:
            log.append(ROLLOUT, [Message("refused", "k", 1.0, b"{}")])
        if "replicas" in str(error.value):
            return str(error.value)
    raise AssertionError(f"the last word was {error.value}")


def test_too_few_replicas_are_named_and_cost_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    needs_release()
    with Cluster(tmp_path / "kafka", brokers=3) as cluster:
        settings = on(cluster.bootstrap, tmp_path, replication=3, min_insync_replicas=3, timeout_s=5.0)
        log = KafkaLog(settings)
        log.append(ROLLOUT, [Message(str(i), "k", 1.0, b"{}") for i in range(50)])
        cluster.brokers[2].signal(signal.SIGKILL)
        assert "[log.kafka] min_insync_replicas" in refused(log)
        words = [problem.words for problem in check(settings)]
        assert any("takes no message below 3 (min.insync.replicas)" in each for each in words), words
        cluster.brokers[2].start()
        cluster.until_ready()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                log.append(ROLLOUT, [Message("after", "k", 1.0, b"{}")])
                break
            except LogError:
                assert time.monotonic() < deadline
        ids = [record.message.id for record in read_all(log, ROLLOUT)]
        assert [id for id in ids if id.isdigit()] == [str(i) for i in range(50)]
        assert "after" in ids
        log.close()
