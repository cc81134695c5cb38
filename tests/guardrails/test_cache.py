"""The cache gives back what was put in, by suite and version, also to the next process."""

import sqlite3
from pathlib import Path

import pytest

from guardrails.cache import MIGRATIONS, AnswerCache
from tests.guardrails.evidence import answer, answers


def test_answers_survive_the_process_and_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "guardrails.sqlite"
    first = AnswerCache(path)
    kept = answers("v1", [answer("ü <|x|>", [-0.25, -1.5], ended=True)], required=[answer()])
    first.put("suite-a", kept)
    first.close()
    second = AnswerCache(path)
    assert second.get("suite-a", "sha256:v1") == kept
    assert second.get("suite-b", "sha256:v1") is None
    assert second.get("suite-a", "sha256:v2") is None
    second.close()


def test_a_newer_releases_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "guardrails.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(sqlite3.DatabaseError, match="newer release"):
        AnswerCache(path)
