"""What is the SQLite log's own: one file, one order, copies dropped as they come, disks that fill up."""

import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from thumbwheel.errors import LogError
from thumbwheel.log import Message, SqliteLog
from thumbwheel.log.port import read_all
from thumbwheel.log.sqlite import MIGRATIONS

TOPIC = "llm.feedback.submitted.v1"


def message(id: str, key: str = "k", value: bytes = b"{}", time: float = 1.5) -> Message:
    return Message(id, key, time, value)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SqliteLog]:
    made = SqliteLog(tmp_path / "log.sqlite")
    yield made
    made.close()


def test_a_second_copy_of_an_id_is_dropped_and_the_first_stands(log: SqliteLog) -> None:
    log.append(TOPIC, [message("a", value=b"1"), message("b")])
    (again,) = log.append(TOPIC, [message("a", value=b"2")])
    assert again.duplicate
    assert again.offset == 0
    assert [record.message.value for record in log.read(TOPIC, 0)] == [b"1", b"{}"]
    assert log.append(TOPIC, [message("c")])[0].offset == 2


def test_an_id_is_found(log: SqliteLog) -> None:
    log.append(TOPIC, [message("a")])
    found = log.find(TOPIC, "a")
    assert found is not None
    assert found.message == message("a")
    assert log.find(TOPIC, "b") is None
    assert log.find("policy.rollout.v1", "a") is None


def test_an_append_that_fails_leaves_nothing(log: SqliteLog) -> None:
    bad = Message("b", "k", 1.0, None)  # type: ignore[arg-type]
    with pytest.raises(LogError):
        log.append(TOPIC, [message("a"), bad])
    assert log.read(TOPIC, 0) == []
    assert log.append(TOPIC, [message("a")])[0].offset == 0


def test_messages_of_several_topics_are_appended_as_one(log: SqliteLog) -> None:
    places = log.append_all([("a", message("1")), ("b", message("2")), ("a", message("3")), ("b", message("2"))])
    assert [(place.offset, place.duplicate) for place in places] == [(0, False), (0, False), (1, False), (0, True)]


def test_all_topics_have_one_order_each(log: SqliteLog) -> None:
    log.append(TOPIC, [message(str(i), key=f"k{i % 3}") for i in range(1200)])
    assert [record.message.id for record in read_all(log, TOPIC)] == [str(i) for i in range(1200)]
    assert log.partitions(TOPIC) == 1


def test_a_file_that_is_no_log_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    path.write_bytes(b"this is not a database, it only looks like a file" * 100)
    before = path.read_bytes()
    with pytest.raises(LogError, match=r"log\.sqlite.*\[log\] path"):
        SqliteLog(path)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match=r"file/log\.sqlite.*\[log\] outbox"):
        SqliteLog(tmp_path / "file" / "log.sqlite", "[log] outbox")


def test_a_log_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    SqliteLog(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(LogError, match="newer release"):
        SqliteLog(path)


def test_a_file_of_the_first_release_keeps_its_events(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(MIGRATIONS[0])
    connection.execute("INSERT INTO events VALUES (?, 0, 'old', 'k', 1.5, ?)", (TOPIC, b"{}"))
    connection.execute("INSERT INTO topics VALUES (?, 1)", (TOPIC,))
    connection.execute("INSERT INTO groups VALUES ('learner', ?, 1)", (TOPIC,))
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    log = SqliteLog(path)
    assert [record.message for record in log.read(TOPIC, 0)] == [message("old")]
    assert log.committed("learner", TOPIC) == 1
    assert log.append(TOPIC, [message("old")])[0].duplicate
    assert log.append(TOPIC, [Message("new", "k", 2.0, b"{}", (("a", b"\xff"),))])[0].offset == 1
    assert log.read(TOPIC, 1)[0].message.headers == (("a", b"\xff"),)
    identity = log.identity
    log.close()
    again = SqliteLog(path)
    assert again.identity == identity
    again.close()


FILLING = """
import sys
from pathlib import Path
from thumbwheel.errors import LogError
from thumbwheel.log import Message, SqliteLog

log = SqliteLog(Path(sys.argv[1]), "[log] outbox")
try:
    for i in range(10_000):
        log.append("t", [Message(str(i), "k", 1.0, bytes(10_000))])
        print(i, flush=True)
except LogError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def test_a_disk_that_is_full_is_named_and_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", FILLING, str(path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000)),
    )
    assert done.returncode == LogError.exit_code, done.stderr
    assert "cannot append to the event log" in done.stderr
    assert "([log] outbox)" in done.stderr
    assert "full" in done.stderr or "I/O" in done.stderr
    acknowledged = done.stdout.split()
    assert len(acknowledged) > 10
    log = SqliteLog(path)
    assert [record.message.id for record in read_all(log, "t")] == acknowledged
    log.append("t", [Message("room again", "k", 1.0, bytes(10_000))])
    log.close()
