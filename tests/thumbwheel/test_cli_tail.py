"""`thumbwheel log tail` while it follows: what is new, Ctrl-C, readers and brokers that go away."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import pytest

from tests import kafka
from tests.thumbwheel.command import command, configure
from tests.thumbwheel.samples import put, vote
from thumbwheel.demo.broker import Cluster
from thumbwheel.events import FEEDBACK
from thumbwheel.log import Log, Message, open_log
from thumbwheel.log.kafka.connection import Connection
from thumbwheel.log.kafka.topics import make
from thumbwheel.settings import load

pytestmark = pytest.mark.slow


class Following:
    """A `log tail` at work, and the lines of its two outputs as they come."""

    def __init__(self, config: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            command(config, "log", "tail", *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell without job control lets what it puts into the background ignore Ctrl-C, and all its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.out: SimpleQueue[str] = SimpleQueue()
        self.err: SimpleQueue[str] = SimpleQueue()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.out)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.err)),
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _read(stream: IO[str], queue: SimpleQueue[str]) -> None:
        with stream:
            for line in stream:
                queue.put(line)

    def key(self, timeout_s: float = 30) -> str:
        """The key of the next event."""
        return str(json.loads(self.out.get(timeout=timeout_s))["response_id"])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def following(config: Path, log: Log) -> Iterator[Following]:
    """One that has shown that it is at work."""
    put(log, vote("old"))
    tail = Following(config, FEEDBACK, "--since", "1970-01-01", "--json")
    assert tail.key() == "old"
    yield tail
    tail.end()


def test_tail_follows_and_ctrl_c_ends_it_in_good_order(following: Following, log: Log) -> None:
    for i in range(5):
        put(log, vote(f"r{i}"))
        assert following.key() == f"r{i}"
    following.process.send_signal(signal.SIGINT)
    assert following.process.wait(20) == 0
    following.end()
    assert following.err.empty()


def test_tail_by_itself_shows_only_what_is_new(config: Path, log: Log) -> None:
    put(log, vote("old"))
    tail = Following(config, "--json", "--limit", "1")
    deadline = time.monotonic() + 30
    count = 0
    while tail.process.poll() is None and time.monotonic() < deadline:
        put(log, vote(f"new{count}", time=2.0 + count))
        count += 1
        time.sleep(0.2)
    assert tail.process.wait(1) == 0
    assert tail.key(1).startswith("new")
    tail.end()
    assert tail.out.empty()


def test_tail_moves_nobodys_place(following: Following, config: Path, log: Log) -> None:
    settings = load(config)
    if settings.log.backend == "kafka":
        admin = Connection(settings).admin()
        groups = [group["group_id"] for group in admin.list_groups()]
        admin.close()
        assert [group for group in groups if group.startswith(settings.log.kafka.prefix)] == []
    assert log.committed("learner", FEEDBACK) == 0


@pytest.mark.parametrize("arguments", [["read", FEEDBACK], ["tail", "--from-start"], ["tail", "--no-follow"]])
def test_a_reader_that_goes_away_ends_it_in_good_order(config: Path, log: Log, arguments: list[str]) -> None:
    log.append(FEEDBACK, [Message(f"m{i}", f"r{i}", float(i), b"x" * 200) for i in range(2000)])
    process = subprocess.Popen(command(config, "log", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_reader_that_goes_away_is_noticed_while_nothing_happens(config: Path, log: Log) -> None:
    put(log, vote("only"))
    process = subprocess.Popen(command(config, "log", "tail", "--from-start"), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert b"only" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 0


@pytest.mark.kafka
def test_a_broker_that_goes_away_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    kafka.needs_release()
    with Cluster(tmp_path / "cluster") as cluster:
        config = configure(tmp_path, kafka.kafka(cluster.bootstrap, timeout_s=3.0))
        make(load(config))
        append(config, "before")
        tail = Following(config, FEEDBACK, "--from-start", "--json")
        assert tail.key() == "before"
        cluster.brokers[0].signal(signal.SIGKILL)
        assert "waiting for it" in tail.err.get(timeout=30)
        time.sleep(6)
        cluster.brokers[0].start()
        cluster.until_ready()
        assert "back" in tail.err.get(timeout=60)
        append(config, "after")
        assert tail.key() == "after"
        assert tail.process.poll() is None
        tail.end()
        assert tail.err.empty()


def append(config: Path, response_id: str) -> None:
    log = open_log(load(config))
    put(log, vote(response_id))
    log.close()
