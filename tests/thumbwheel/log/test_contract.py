"""What every log keeps, whatever it is made of."""

import multiprocessing
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from thumbwheel.errors import LogError
from thumbwheel.log import Log, Message, SqliteLog
from thumbwheel.reader import read_all

TOPIC = "llm.feedback.submitted.v1"


def message(id: str, key: str = "k", value: bytes = b"{}") -> Message:
    return Message(id, key, 1.5, value)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = SqliteLog(tmp_path / "log.sqlite")
    yield made
    made.close()


def test_an_empty_topic_has_equal_ends_and_nothing_to_read(log: Log) -> None:
    assert log.ends(TOPIC) == (0, 0)
    assert log.read(TOPIC, 0) == []


def test_records_come_back_in_order_as_they_were_appended(log: Log) -> None:
    sent = [message(str(i), key=f"k{i % 3}", value=f"wert {i} ✓".encode()) for i in range(1200)]
    log.append(TOPIC, sent[:700])
    log.append(TOPIC, sent[700:])
    records = list(read_all(log, TOPIC))
    assert [record.message for record in records] == sent
    assert [record.offset for record in records] == list(range(1200))
    assert log.ends(TOPIC) == (0, 1200)


def test_a_second_copy_of_an_id_is_dropped_and_the_first_stands(log: Log) -> None:
    log.append(TOPIC, [message("a", value=b"1"), message("b")])
    (again,) = log.append(TOPIC, [message("a", value=b"2")])
    assert again.duplicate
    assert again.offset == 0
    assert [record.message.value for record in log.read(TOPIC, 0)] == [b"1", b"{}"]
    assert log.append(TOPIC, [message("c")])[0].offset == 2


def test_one_id_may_stand_on_two_topics(log: Log) -> None:
    log.append(TOPIC, [message("a")])
    assert not log.append("policy.rollout.v1", [message("a")])[0].duplicate


def test_a_group_reads_on_where_it_committed(log: Log) -> None:
    log.append(TOPIC, [message(str(i)) for i in range(5)])
    assert log.committed("learner", TOPIC) == 0
    log.commit("learner", TOPIC, 3)
    assert log.committed("learner", TOPIC) == 3
    assert log.committed("other", TOPIC) == 0
    assert [record.message.id for record in log.read(TOPIC, log.committed("learner", TOPIC))] == ["3", "4"]


def test_a_megabyte_comes_back_whole(log: Log) -> None:
    value = bytes(range(256)) * 4096
    log.append(TOPIC, [message("big", value=value)])
    assert log.read(TOPIC, 0)[0].message.value == value


def test_a_limit_bounds_what_one_read_returns(log: Log) -> None:
    log.append(TOPIC, [message(str(i)) for i in range(10)])
    assert [record.offset for record in log.read(TOPIC, 4, limit=3)] == [4, 5, 6]


def _append_many(path: Path, name: str) -> None:
    log = SqliteLog(path)
    for i in range(100):
        log.append(TOPIC, [message(f"{name}-{i}", key=name, value=str(i).encode())])
    log.close()


def test_several_processes_append_at_once_without_loss_and_in_order_per_key(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(path, f"w{i}")) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    log = SqliteLog(path)
    records = list(read_all(log, TOPIC))
    assert [record.offset for record in records] == list(range(300))
    for name in ("w0", "w1", "w2"):
        assert [int(r.message.value) for r in records if r.message.key == name] == list(range(100))
    log.close()


def test_what_was_appended_is_there_after_the_file_is_opened_again(tmp_path: Path) -> None:
    first = SqliteLog(tmp_path / "log.sqlite")
    first.append(TOPIC, [message("a")])
    first.close()
    second = SqliteLog(tmp_path / "log.sqlite")
    assert second.find(TOPIC, "a") is not None
    assert second.find(TOPIC, "b") is None
    second.close()


def test_a_file_that_is_no_log_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    path.write_bytes(b"this is not a database, it only looks like a file" * 100)
    before = path.read_bytes()
    with pytest.raises(LogError, match=r"log\.sqlite.*\[log\] path"):
        SqliteLog(path)
    assert path.read_bytes() == before


def test_a_log_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    SqliteLog(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(LogError, match="newer release"):
        SqliteLog(path)


def test_an_append_that_fails_leaves_nothing(log: Log) -> None:
    assert isinstance(log, SqliteLog)
    bad = Message("b", "k", 1.0, None)  # type: ignore[arg-type]
    with pytest.raises(LogError):
        log.append(TOPIC, [message("a"), bad])
    assert log.read(TOPIC, 0) == []
    assert log.append(TOPIC, [message("a")])[0].offset == 0
