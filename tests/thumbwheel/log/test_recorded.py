"""A log that is only read: it gives what is there and changes no byte, whoever else has it open."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.thumbwheel.samples import put, vote
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK
from thumbwheel.log import Message, SqliteLog
from thumbwheel.log.recorded import RecordedLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "what? a log #1.sqlite"
    log = SqliteLog(path)
    put(log, *(vote(f"r{i}") for i in range(3)))
    log.commit("learner", FEEDBACK, 2)
    log.close()
    return path


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.parent.iterdir() if file.is_file() and not file.name.endswith("-shm"))
    return {file.name: file.read_bytes() for file in files}


def read(path: Path) -> tuple[str, int]:
    log = RecordedLog(path, "--from")
    found = (log.identity, len(log.read(FEEDBACK, 0)))
    assert log.ends(FEEDBACK) == (0, found[1])
    log.close()
    return found


def test_it_reads_what_is_there_and_leaves_every_byte(path: Path) -> None:
    before, names = contents(path), os.listdir(path.parent)
    identity, count = read(path)
    assert count == 3
    assert contents(path) == before
    assert os.listdir(path.parent) == names
    log = SqliteLog(path)
    assert log.identity == identity
    log.close()


def test_what_a_killed_writer_left_in_the_wal_is_read_and_stays_there(path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from thumbwheel.log import Message, SqliteLog
SqliteLog(Path({str(path)!r})).append({FEEDBACK!r}, [Message("late", "k", 1.0, b"late")])
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    before = contents(path)
    assert len(before[f"{path.name}-wal"]) > 0
    assert read(path)[1] == 4
    assert contents(path) == before


def test_what_is_appended_meanwhile_is_seen(path: Path) -> None:
    writer = SqliteLog(path)
    reader = RecordedLog(path, "--from")
    assert len(reader.read(FEEDBACK, 0)) == 3
    writer.append(FEEDBACK, [Message("more", "k", 1.0, b"more")])
    assert len(reader.read(FEEDBACK, 0)) == 4
    reader.close()
    writer.append(FEEDBACK, [Message("still more", "k", 1.0, b"more")])
    writer.close()


def test_appends_and_commits_fail(path: Path) -> None:
    log = RecordedLog(path, "--from")
    with pytest.raises(LogError, match="readonly"):
        log.append(FEEDBACK, [Message("no", "k", 1.0, b"no")])
    with pytest.raises(LogError, match="readonly"):
        log.commit("learner", FEEDBACK, 3)
    assert log.committed("learner", FEEDBACK) == 2
    log.close()


def refused(path: Path, words: str) -> None:
    before = contents(path)
    with pytest.raises(LogError, match=rf"--from.*{words}") as raised:
        RecordedLog(path, "--from")
    assert str(path) in str(raised.value)
    assert contents(path) == before


def test_what_is_no_log_of_this_release_is_refused_as_it_is(path: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none.sqlite", "no such file")
    (tmp_path / "directory").mkdir()
    refused(tmp_path / "directory", "no such file")
    strange = tmp_path / "strange.sqlite"
    strange.write_bytes(b"no database, however long one looks at it" * 100)
    refused(strange, "not a database")
    strange.write_bytes(b"")
    refused(strange, "no event log")
    db = sqlite3.connect(strange)
    db.execute("CREATE TABLE events (a)")
    db.close()
    refused(strange, "no event log")
    for schema, words in ((99, "a newer release: schema 99"), (1, "an older release: copy it")):
        db = sqlite3.connect(path)
        db.execute(f"PRAGMA user_version = {schema}")
        db.close()
        refused(path, words)
