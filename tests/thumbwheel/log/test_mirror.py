"""The mirror: it follows the rollout, reads nothing twice, and says when it knows all of it."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import kafka
from thumbwheel.errors import LogError
from thumbwheel.events import ROLLOUT, ReplicaReported
from thumbwheel.log import Appended, Log, Message, SqliteLog, message_of, open_log
from thumbwheel.log.deadletter import dlq, letters
from thumbwheel.log.mirror import Mirror, whole
from thumbwheel.log.port import read_all

GROUP = "gateway.r1"


class Source(SqliteLog):
    """A log that notes what is read from it, and fails when a test wants it to."""

    read_offsets: list[int]
    refuses = False

    def read(self, topic: str, offset: int, limit: int = 500, partition: int = 0) -> Any:
        found = super().read(topic, offset, min(limit, 2), partition)
        self.read_offsets = [*getattr(self, "read_offsets", []), *(record.offset for record in found)]
        return found

    def append(self, topic: str, messages: Sequence[Message]) -> list[Appended]:
        if self.refuses:
            raise LogError("no room")
        return super().append(topic, messages)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    log = Source(tmp_path / "log.sqlite")
    yield log
    log.close()


@pytest.fixture
def mirrored(tmp_path: Path) -> Iterator[SqliteLog]:
    log = SqliteLog(tmp_path / "mirror.sqlite", "[log] mirror")
    yield log
    log.close()


def report(log: Log, *replicas: str) -> None:
    log.append(ROLLOUT, [message_of(ReplicaReported(source="test", replica=name, serving="base")) for name in replicas])


def replicas(log: Log) -> list[str]:
    return [record.message.key for record in read_all(log, ROLLOUT)]


def drain(mirror: Mirror) -> None:
    while mirror.poll():
        pass


def test_it_copies_what_is_there_and_then_what_comes_as_it_is(source: Source, mirrored: SqliteLog) -> None:
    report(source, "a", "b", "c")
    mirror = Mirror(source, mirrored, GROUP)
    drain(mirror)
    report(source, "d")
    assert mirror.poll()
    assert not mirror.poll()
    assert [r.message for r in read_all(mirrored, ROLLOUT)] == [r.message for r in read_all(source, ROLLOUT)]
    assert replicas(mirrored) == ["a", "b", "c", "d"]


def test_a_restart_reads_on_where_the_mirror_stands_and_not_all_again(source: Source, mirrored: SqliteLog) -> None:
    report(source, "a", "b", "c")
    drain(Mirror(source, mirrored, GROUP))
    report(source, "d")
    source.read_offsets.clear()
    drain(Mirror(source, mirrored, "gateway.another-group-that-never-committed"))
    assert source.read_offsets == [3]
    assert replicas(mirrored) == ["a", "b", "c", "d"]


def test_it_is_whole_once_it_held_all_that_was_there_at_its_start_and_ever_after(
    source: Source, mirrored: SqliteLog, tmp_path: Path
) -> None:
    report(source, "a", "b", "c", "d", "e")
    mirror = Mirror(source, mirrored, GROUP)
    assert not whole(mirrored)
    mirror.poll()
    report(source, "f")
    mirror.poll()
    assert replicas(mirrored) == ["a", "b", "c", "d"]
    assert not whole(mirrored)
    mirror.poll()
    assert whole(mirrored)
    report(source, "g", "h", "i")
    Mirror(source, mirrored, GROUP)
    reopened = SqliteLog(tmp_path / "mirror.sqlite")
    assert whole(reopened)
    reopened.close()


def test_the_mirror_of_an_empty_log_is_whole_at_once_and_stays_of_use(source: Source, mirrored: SqliteLog) -> None:
    Mirror(source, mirrored, GROUP).poll()
    assert whole(mirrored)
    again = Mirror(source, mirrored, GROUP)
    again.poll()
    report(source, "a")
    drain(again)
    assert replicas(mirrored) == ["a"]


def test_what_cannot_be_read_goes_to_the_dead_letters_and_the_rest_is_copied(
    source: Source, mirrored: SqliteLog
) -> None:
    report(source, "a")
    source.append(ROLLOUT, [Message("poison", "p", 1.0, b"{not json")])
    newer = ReplicaReported(source="test", replica="n", serving="base", schema_version="2.0")
    source.append(ROLLOUT, [message_of(newer)])
    report(source, "b")
    drain(Mirror(source, mirrored, GROUP))
    assert replicas(mirrored) == ["a", "b"]
    assert whole(mirrored)
    found = letters(source, ROLLOUT)
    assert [(letter.offset, letter.group) for letter in found] == [(1, GROUP), (2, GROUP)]
    assert found[0].original.value == b"{not json"
    assert "2.0" in found[1].why


def test_nothing_is_skipped_while_the_dead_letters_cannot_be_kept(source: Source, mirrored: SqliteLog) -> None:
    report(source, "a")
    source.append(ROLLOUT, [Message("poison", "p", 1.0, b"{not json")])
    report(source, "b")
    mirror = Mirror(source, mirrored, GROUP)
    source.refuses = True
    for _ in range(3):
        with pytest.raises(LogError, match="no room"):
            mirror.poll()
    assert replicas(mirrored) == []
    source.refuses = False
    drain(mirror)
    assert replicas(mirrored) == ["a", "b"]
    assert source.ends(dlq(ROLLOUT)) == (0, 1)


def test_nothing_is_skipped_while_the_mirror_cannot_be_written(
    source: Source, mirrored: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(source, "a", "b", "c")
    mirror = Mirror(source, mirrored, GROUP)
    with monkeypatch.context() as patch:

        def fail(topic: str, messages: object) -> list[Appended]:
            raise LogError("the disk is full")

        patch.setattr(mirrored, "append", fail)
        with pytest.raises(LogError, match="disk is full"):
            mirror.poll()
    drain(mirror)
    assert replicas(mirrored) == ["a", "b", "c"]


def test_the_rollout_of_another_log_is_not_mixed_in(source: Source, mirrored: SqliteLog, tmp_path: Path) -> None:
    report(source, "a")
    drain(Mirror(source, mirrored, GROUP))
    other = SqliteLog(tmp_path / "other.sqlite")
    report(other, "x")
    for _ in range(2):
        with pytest.raises(LogError, match=r"mirror\.sqlite \(\[log\] mirror\) is the rollout of another cluster"):
            Mirror(other, mirrored, GROUP).poll()
    assert replicas(mirrored) == ["a"]
    other.close()


@pytest.mark.kafka
def test_it_follows_kafka_and_goes_on_after_a_restart(kafka_address: str, mirrored: SqliteLog, tmp_path: Path) -> None:
    log = open_log(kafka.on(kafka_address, tmp_path))
    report(log, "a", "b")
    log.append(ROLLOUT, [Message("poison", "p", 1.0, b"{not json")])

    def follow(mirror: Mirror, *expected: str) -> None:
        deadline = time.monotonic() + 20
        while replicas(mirrored) != list(expected) or not whole(mirrored):
            mirror.poll()
            assert time.monotonic() < deadline, replicas(mirrored)
            time.sleep(0.02)

    mirror = Mirror(log, mirrored, GROUP)
    try:
        follow(mirror, "a", "b")
        report(log, "c")
        follow(mirror, "a", "b", "c")
    finally:
        mirror.close()
    assert mirrored.committed(log.identity, ROLLOUT) == 4
    report(log, "d")
    mirror = Mirror(log, mirrored, GROUP)
    try:
        follow(mirror, "a", "b", "c", "d")
    finally:
        mirror.close()
    assert [letter.offset for letter in letters(log, ROLLOUT)] == [2]
    log.close()
