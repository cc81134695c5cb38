"""The SQLite file behind the learner's buffer: its tables through the releases, and what is done with any of them."""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from learner.join import State
from thumbwheel.errors import ThumbwheelError
from thumbwheel.migrations import migrate

MIGRATIONS = (
    """
    CREATE TABLE offsets (
        topic TEXT NOT NULL, partition INTEGER NOT NULL, "offset" INTEGER NOT NULL, PRIMARY KEY (topic, partition)
    ) WITHOUT ROWID;
    CREATE TABLE responses (response_id TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE answers (
        response_id TEXT NOT NULL,
        choice_index INTEGER NOT NULL,
        prompt TEXT NOT NULL,
        completion TEXT NOT NULL,
        problem TEXT,
        PRIMARY KEY (response_id, choice_index)
    );
    CREATE INDEX answers_by_problem ON answers (problem);
    CREATE TABLE votes (
        feedback_id TEXT PRIMARY KEY,
        response_id TEXT NOT NULL,
        choice_index INTEGER NOT NULL,
        user TEXT NOT NULL,
        up INTEGER,
        time REAL NOT NULL,
        state TEXT NOT NULL,
        reason TEXT
    );
    CREATE INDEX votes_by_response ON votes (response_id);
    CREATE INDEX votes_by_state ON votes (state, up, time);
    CREATE TABLE unreadable (
        topic TEXT NOT NULL,
        partition INTEGER NOT NULL,
        "offset" INTEGER NOT NULL,
        reason TEXT NOT NULL,
        PRIMARY KEY (topic, partition, "offset")
    );
    """,
    """
    DROP TABLE unreadable;
    DROP TABLE offsets;
    CREATE TABLE offsets (
        log TEXT NOT NULL,
        topic TEXT NOT NULL,
        partition INTEGER NOT NULL,
        "offset" INTEGER NOT NULL,
        PRIMARY KEY (log, topic, partition)
    ) WITHOUT ROWID;
    UPDATE answers SET prompt = replace(prompt, ', ', ','), completion = replace(completion, ', ', ',');
    CREATE TABLE held_out (number INTEGER PRIMARY KEY, prompt TEXT NOT NULL UNIQUE);
    INSERT INTO held_out (prompt)
        SELECT prompt FROM answers WHERE problem = 'its prompt is held out to measure KL'
        GROUP BY prompt ORDER BY min(rowid);
    DROP INDEX answers_by_problem;
    DROP INDEX votes_by_state;
    CREATE INDEX votes_by_state ON votes (state, up, time, feedback_id);
    """,
    """
    ALTER TABLE answers ADD COLUMN behaviour BLOB NOT NULL DEFAULT x'';
    ALTER TABLE answers ADD COLUMN version TEXT NOT NULL DEFAULT '';
    ALTER TABLE answers ADD COLUMN ended INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE answers ADD COLUMN topic TEXT NOT NULL DEFAULT '';
    ALTER TABLE answers ADD COLUMN prompt_key BLOB;
    ALTER TABLE answers ADD COLUMN completion_key BLOB;
    ALTER TABLE answers ADD COLUMN text_key BLOB;
    UPDATE answers SET prompt_key = key(prompt), completion_key = key(completion) WHERE problem IS NULL;
    ALTER TABLE votes ADD COLUMN topic TEXT NOT NULL DEFAULT '';
    ALTER TABLE votes ADD COLUMN correction TEXT;
    ALTER TABLE votes ADD COLUMN corrected TEXT;
    ALTER TABLE votes ADD COLUMN preferred_over TEXT;
    ALTER TABLE votes ADD COLUMN source TEXT;
    ALTER TABLE votes ADD COLUMN prompt_key BLOB;
    ALTER TABLE votes ADD COLUMN completion_key BLOB;
    UPDATE votes SET source = 'votes', prompt_key = answers.prompt_key, completion_key = answers.completion_key
        FROM answers WHERE answers.response_id = votes.response_id AND answers.choice_index = votes.choice_index
        AND problem IS NULL AND up IS NOT NULL AND state IN ('ready', 'learned');
    CREATE INDEX votes_by_preferred ON votes (preferred_over) WHERE preferred_over IS NOT NULL;
    CREATE INDEX votes_that_stand ON votes (time, feedback_id) WHERE source IS NOT NULL;
    CREATE INDEX votes_to_match ON votes (prompt_key, up, time, feedback_id)
        WHERE state = 'ready' AND source = 'votes';
    CREATE INDEX votes_to_match_by_answer ON votes (prompt_key, up, completion_key, time, feedback_id)
        WHERE state = 'ready' AND source = 'votes';
    CREATE TABLE pairs (
        feedback_id TEXT PRIMARY KEY,
        other TEXT,
        kind TEXT NOT NULL,
        prompt_key BLOB NOT NULL,
        time REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX pairs_by_time ON pairs (time, feedback_id);
    CREATE INDEX pairs_by_prompt ON pairs (prompt_key) WHERE kind = 'votes';
    CREATE TABLE unmatched (prompt_key BLOB PRIMARY KEY) WITHOUT ROWID;
    INSERT INTO unmatched SELECT DISTINCT prompt_key FROM votes WHERE state = 'ready' AND source = 'votes';
    """,
)
"""`key` in them is the function below. `pairs` names the ready votes of each pair: with "votes" an up and a down."""

_TALLY = (
    "CREATE TEMP TABLE tally (state TEXT, up INTEGER, n INTEGER, PRIMARY KEY (state, up)) WITHOUT ROWID",
    *(f"INSERT INTO tally VALUES ('{state}', {up}, 0)" for state in get_args(State) for up in (-1, 0, 1)),
    "UPDATE tally SET n = found.n FROM (SELECT state, ifnull(up, -1) AS up, count(*) AS n FROM votes GROUP BY 1, 2)"
    " AS found WHERE tally.state = found.state AND tally.up = found.up",
    "CREATE TEMP TRIGGER vote_came AFTER INSERT ON votes BEGIN"
    " UPDATE tally SET n = n + 1 WHERE state = new.state AND up = ifnull(new.up, -1); END",
    "CREATE TEMP TRIGGER vote_changed AFTER UPDATE OF state, up ON votes BEGIN"
    " UPDATE tally SET n = n - 1 WHERE state = old.state AND up = ifnull(old.up, -1);"
    " UPDATE tally SET n = n + 1 WHERE state = new.state AND up = ifnull(new.up, -1); END",
    "CREATE TEMP TABLE pair_tally AS SELECT count(*) AS n FROM pairs",
    "CREATE TEMP TRIGGER pair_came AFTER INSERT ON pairs BEGIN UPDATE pair_tally SET n = n + 1; END",
    "CREATE TEMP TRIGGER pair_went AFTER DELETE ON pairs BEGIN UPDATE pair_tally SET n = n - 1; END",
)
"""Votes by state and rating (-1 is a retraction), and pairs, counted once when the file is opened and kept from then
on."""

VARIABLES = 500
"""Values in one `IN (…)`."""


def connect(path: Path) -> sqlite3.Connection:
    """Open or make the file, brought up to date. Raises ThumbwheelError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=30, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA temp_store=MEMORY")
        db.create_function("key", 1, key, deterministic=True)
        migrate(db, MIGRATIONS)
        for statement in _TALLY:
            db.execute(statement)
    except (OSError, sqlite3.Error) as error:
        raise ThumbwheelError(f"cannot open the learner's buffer {path}: {error}") from error
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All that is written within it, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def among(db: sqlite3.Connection, statement: str, ids: Iterable[str] | Iterable[bytes]) -> list[Any]:
    """All rows of a statement with `IN ({})` in it, run for a part of the ids at a time."""
    some, rows = sorted(ids), []
    for start in range(0, len(some), VARIABLES):
        part = some[start : start + VARIABLES]
        rows += db.execute(statement.format(",".join("?" * len(part))), part).fetchall()
    return rows


def key(text: str | None) -> bytes | None:
    """Equal for texts that are equal but for white space around them."""
    return None if text is None else hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
