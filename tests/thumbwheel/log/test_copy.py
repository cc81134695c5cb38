"""Moving house, on the real logs."""

import multiprocessing
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import kafka
from tests.thumbwheel.samples import EVERY, response, vote
from thumbwheel.errors import LogError, SettingsError
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT
from thumbwheel.log import Log, Message, SqliteLog, message_of, open_log
from thumbwheel.log.copy import ALL, BATCH, copy, place, source
from thumbwheel.log.deadletter import letters, send
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.log.kafka.topics import make
from thumbwheel.log.port import read_all
from thumbwheel.settings import Settings


def events(count: int = 1500) -> list[tuple[str, Message]]:
    """Responses, votes and decisions; keys that come again, one megabyte, texts of all kinds, headers of strangers."""
    rng = random.Random(7)
    began = time.time() - 3600  # Kafka drops what is older than the topics keep it
    made: list[tuple[str, Message]] = []
    for i in range(count):
        key, at = f"r{rng.randrange(count // 4)}", began + i + rng.random()
        kind = i % 5
        if kind < 2:
            made.append((RESPONSES, message_of(response(key, at, text=f"Größe ✓ 漢字 \U0001f44d {i}"))))
        elif kind < 4:
            made.append((FEEDBACK, message_of(vote(key, at, comment=f"“{i}”"))))
        else:
            made.append((ROLLOUT, message_of(EVERY[2 + i % 7].model_copy(update={"id": f"e{i}", "time": at}))))
    big = message_of(response("big", began + 0.25, text="x" * 1_000_000))
    made.insert(count // 2, (RESPONSES, big))
    strange = (("tracestate", b"\xfe"), ("ce_type", b""))
    made.insert(9, (FEEDBACK, Message("odd", "größe\udcff", 0.1, b"\xff\x00", strange)))
    return made


def fill(log: Log, items: Sequence[tuple[str, Message]]) -> None:
    for topic in (RESPONSES, FEEDBACK, ROLLOUT):
        log.append(topic, [message for name, message in items if name == topic])
    odd = next(record for record in read_all(log, FEEDBACK) if record.message.id == "odd")
    send(log, odd, "learner", ValueError("no JSON"))


def content(log: Log) -> dict[tuple[str, str], list[Message]]:
    """What each key of each topic holds, in order, copies left out by the id."""
    found: dict[tuple[str, str], list[Message]] = defaultdict(list)
    for topic in ALL:
        seen: set[str] = set()
        for partition in range(log.partitions(topic)):
            for record in read_all(log, topic, 0, partition):
                if record.message.id not in seen:
                    seen.add(record.message.id)
                    found[topic, record.message.key].append(record.message)
    return dict(found)


def size(log: Log) -> int:
    return sum(log.ends(topic, partition)[1] for topic in ALL for partition in range(log.partitions(topic)))


def test_a_copy_from_file_to_file_keeps_everything_and_a_second_one_has_nothing_to_do(tmp_path: Path) -> None:
    first, second = SqliteLog(tmp_path / "a.sqlite"), SqliteLog(tmp_path / "b.sqlite")
    fill(first, events(300))
    assert sum(one.read for one in copy(first, second)) == 303
    assert content(second) == content(first)
    assert sum(one.read for one in copy(first, second)) == 0
    first.append(FEEDBACK, [message_of(vote("new"))])
    assert {one.topic: one.read for one in copy(first, second) if one.read} == {FEEDBACK: 1}
    first.close()
    second.close()


def test_progress_is_told_up_to_the_end(tmp_path: Path) -> None:
    first, second = SqliteLog(tmp_path / "a.sqlite"), SqliteLog(tmp_path / "b.sqlite")
    first.append(FEEDBACK, [message_of(vote(f"r{i}")) for i in range(2 * BATCH + 1)])
    told: list[tuple[str, int, int]] = []
    list(copy(first, second, lambda *words: told.append(words)))
    total = 2 * BATCH + 1
    assert told == [(FEEDBACK, BATCH, total), (FEEDBACK, 2 * BATCH, total), (FEEDBACK, total, total)]
    first.close()
    second.close()


def test_a_log_is_not_copied_onto_itself(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "a.sqlite")
    with pytest.raises(SettingsError, match="the same log"):
        list(copy(log, log))
    log.close()


def test_a_source_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"\[log\] path"):
        source(Settings(data=tmp_path), "sqlite")
    assert list(tmp_path.iterdir()) == []


def _copy_and_die(origin: Settings, target: Settings, way: tuple[str, str], batches: int) -> None:
    """Copy, and die by SIGKILL with some batches noted and one that the target has and nobody noted."""
    here, there = place(origin, way[0]), place(target, way[1])
    commit: Callable[..., None] = here.commit
    left = batches

    def counted(*arguments: object) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        commit(*arguments)

    here.commit = counted  # type: ignore[method-assign, assignment]
    list(copy(here, there))


def killed(origin: Settings, target: Settings, way: tuple[str, str], batches: int) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_copy_and_die, args=(origin, target, way, batches))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.kafka
def test_there_and_back_with_a_kill_on_each_way_loses_nothing_and_doubles_nothing(
    kafka_address: str, tmp_path: Path
) -> None:
    one = Settings(data=tmp_path / "one", log=kafka.kafka(kafka_address))
    two = one.model_copy(update={"data": tmp_path / "two"})
    make(one)
    origin, middle, end = place(one, "sqlite"), KafkaLog(one), place(two, "sqlite")
    fill(origin, events())
    expected = content(origin)
    assert sum(map(len, expected.values())) == 1503

    killed(one, one, ("sqlite", "kafka"), 4)
    noted = origin.ends(RESPONSES)[1]
    assert noted == 601  # four batches
    assert size(middle) == noted + BATCH
    assert sum(copied.read for copied in copy(origin, middle)) == 1503 - noted
    assert size(middle) == 1503 + BATCH  # the copies that readers drop
    assert content(middle) == expected

    killed(one, two, ("kafka", "sqlite"), 5)
    back = list(copy(middle, end))
    assert content(end) == expected
    assert size(end) == 1503
    assert sum(copied.duplicates for copied in back) > BATCH
    assert [letter.original.id for letter in letters(end, FEEDBACK)] == ["odd"]
    assert sum(copied.read for copied in copy(middle, end)) == 0
    for log in (origin, middle, end):
        log.close()


@pytest.mark.kafka
def test_topics_that_were_made_anew_are_filled_anew(kafka_address: str, tmp_path: Path) -> None:
    """The source still says that all of it was copied, to a target of this very identity."""
    settings = kafka.on(kafka_address, tmp_path)
    origin, target = place(settings, "sqlite"), KafkaLog(settings)
    origin.append(FEEDBACK, [message_of(vote())])
    origin.commit(f"copy.{target.identity}", FEEDBACK, 1)
    assert sum(copied.read for copied in copy(origin, target)) == 1
    origin.close()
    target.close()


@pytest.mark.kafka
def test_a_missing_topic_is_said_before_anything_is_sent(kafka_address: str, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, log=kafka.kafka(kafka_address))
    origin, target = place(settings, "sqlite"), open_log(settings)
    origin.append(FEEDBACK, [message_of(vote())])
    with pytest.raises(LogError, match="thumbwheel log init"):
        list(copy(origin, target))
    origin.close()
    target.close()
