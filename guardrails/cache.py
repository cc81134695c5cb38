"""Answers that were sampled already: the reference is asked once for all candidates, and a crash costs no answers."""

import sqlite3
import time
from pathlib import Path

from guardrails.answers import Answers
from thumbwheel.migrations import migrate

MIGRATIONS = (
    """
    CREATE TABLE answers (
        suite TEXT NOT NULL, version_digest TEXT NOT NULL, created REAL NOT NULL, answers TEXT NOT NULL,
        PRIMARY KEY (suite, version_digest)
    ) WITHOUT ROWID;
    """,
)


class AnswerCache:
    """A SQLite file. Keys are digests, of the suite and of the version, so an entry never goes stale."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=30, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        migrate(self._connection, MIGRATIONS)

    def get(self, suite: str, version_digest: str) -> Answers | None:
        row = self._connection.execute(
            "SELECT answers FROM answers WHERE suite = ? AND version_digest = ?", (suite, version_digest)
        ).fetchone()
        return None if row is None else Answers.model_validate_json(row[0])

    def put(self, suite: str, answers: Answers) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
            (suite, answers.digest, time.time(), answers.model_dump_json()),
        )

    def close(self) -> None:
        self._connection.close()
