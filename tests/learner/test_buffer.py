"""Events, standings and offsets move together, and a replay changes nothing."""

import json
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from learner.buffer import TOPIC, Buffer
from learner.database import MIGRATIONS
from tests.learner.conftest import VOCABULARY, Letters, respond, vote
from thumbwheel.errors import LogError, ThumbwheelError
from thumbwheel.events import FEEDBACK, RESPONSES, Choice, Event
from thumbwheel.log import Record, message_of
from thumbwheel.migrations import migrate


def records(*events: Event, start: int = 0) -> list[Record]:
    """The events of one topic as they would lie on the log."""
    return [Record(event.topic, 0, start + i, message_of(event)) for i, event in enumerate(events)]


def consume(buffer: Buffer, records: list[Record]) -> None:
    """As the intake does it, for records that can be read."""
    if records:
        buffer.consume([buffer.entry(record) for record in records], records[-1])


def made(path: Path, log: str = "a") -> Buffer:
    return Buffer(path, VOCABULARY, lambda prompt: prompt == [9], log)


def said(ids: list[int], index: int = 0, reason: str = "stop") -> list[Choice]:
    return [Choice(index=index, finish_reason=reason, token_ids=ids, logprobs=[-0.1 * id for id in ids])]


@pytest.fixture
def buffer(tmp_path: Path) -> Iterator[Buffer]:
    buffer = made(tmp_path / "buffer.sqlite")
    yield buffer
    buffer.close()


def test_a_vote_and_its_response_make_an_example_whichever_comes_first(buffer: Buffer) -> None:
    consume(buffer, records(vote("f1", "a")))
    assert buffer.reason("f1") == ("waiting", None)
    consume(buffer, records(respond("a"), respond("b")))
    consume(buffer, records(vote("f2", "b", "down"), start=1))
    (up,), (down,) = buffer.ready(True, 100.0, 9), buffer.ready(False, 100.0, 9)
    assert (up.feedback_id, up.prompt, up.completion, up.up) == ("f1", [2, 3], [4, 5, 1], True)
    assert (down.feedback_id, down.up) == ("f2", False)
    assert buffer.offsets() == {(RESPONSES, 0): 2, (FEEDBACK, 0): 2}


def test_a_vote_that_has_not_settled_is_not_ready(buffer: Buffer) -> None:
    consume(buffer, records(respond("a")))
    consume(buffer, records(vote("f1", "a", time=100.0)))
    assert buffer.count_ready(99.9) == (0, 0)
    assert buffer.count_ready(100.0) == (1, 0)


@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 8), max_size=4), votes_first=st.booleans())
def test_any_cutting_and_repeating_of_the_log_gives_the_same_buffer(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], votes_first: bool
) -> None:
    answers = records(respond("a"), respond("b"), respond("c", [9]), respond("a"))
    votes = records(
        vote("f1", "a"),
        vote("f2", "a", "down", user="u2"),
        vote("f3", "b"),
        vote("f4", "b", "down", time=101.0),
        vote("f1", "a"),
        vote("f5", "c"),
        vote("f6", "a", None, retracted=True, user="u2", time=102.0),
        vote("f7", "z"),
    )
    buffer = made(tmp_path_factory.mktemp("b") / "b.sqlite")
    topics = [votes, answers] if votes_first else [answers, votes]
    for cut in [*cuts, 8]:  # each time again from the start, as after a kill between reading and committing
        for topic in topics:
            consume(buffer, topic[:cut])
    assert buffer.counts() == {"ready": 2, "set_aside": 4, "waiting": 1, "learned": 0}
    assert [e.feedback_id for e in buffer.ready(True, 1e9, 9) + buffer.ready(False, 1e9, 9)] == ["f1", "f4"]
    buffer.close()


def test_an_error_within_a_batch_leaves_neither_events_nor_offset(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffer, "_join", lambda touched: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        consume(buffer, records(respond("a")))
    monkeypatch.undo()
    assert buffer.offsets() == {}
    consume(buffer, records(vote("f1", "a")))
    assert buffer.reason("f1") == ("waiting", None)


def test_a_learned_vote_is_never_ready_again(buffer: Buffer) -> None:
    consume(buffer, records(respond("a")))
    consume(buffer, records(vote("f1", "a")))
    buffer.learned(["f1"], "v1")
    consume(buffer, records(vote("f1", "a"), vote("f2", "a", "down", time=200.0)))
    assert buffer.count_ready(1e9) == (0, 0)
    assert buffer.reason("f1") == ("learned", "v1")
    state, reason = buffer.reason("f2") or ("", "")
    assert state == "set_aside"
    assert "earlier vote" in str(reason)


def test_a_new_buffer_knows_what_was_learned_before_it_reads_the_log(buffer: Buffer) -> None:
    buffer.learned(["f1"], "v1")
    consume(buffer, records(respond("a")))
    consume(buffer, records(vote("f1", "a"), vote("f2", "a", "down", time=200.0), vote("f3", "a", user="u2")))
    assert [example.feedback_id for example in buffer.ready(True, 1e9, 9)] == ["f3"]
    assert buffer.count_ready(1e9) == (1, 0)


def test_what_is_given_back_may_be_learned(buffer: Buffer) -> None:
    consume(buffer, records(respond("a")))
    consume(buffer, records(vote("f1", "a")))
    buffer.learned(["f1"], "v1")
    buffer.give_back(["f1"])
    assert buffer.count_ready(1e9) == (1, 0)


def test_an_answer_that_is_set_aside_stays_so(buffer: Buffer) -> None:
    consume(buffer, records(respond("a")))
    consume(buffer, records(vote("f1", "a")))
    buffer.set_aside("f1", "no number")
    consume(buffer, records(vote("f2", "a", user="u2"), start=1))
    assert buffer.reason("f1") == buffer.reason("f2") == ("set_aside", "no number")


def test_held_out_prompts_come_once_each(buffer: Buffer) -> None:
    consume(buffer, records(respond("a", [9]), respond("b", [9]), respond("c")))
    assert (buffer.held_out_prompts(9), buffer.count_held_out()) == ([[9]], 1)


def test_a_file_that_is_no_buffer_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a database, and long enough to be told apart from one" * 20)
    with pytest.raises(ThumbwheelError, match="cannot open the learner's buffer"):
        made(tmp_path / "x")


def test_a_file_that_is_locked_is_an_error_to_wait_out_and_then_nothing_is_lost(tmp_path: Path, buffer: Buffer) -> None:
    buffer._db.execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(tmp_path / "buffer.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LogError, match=r"cannot write the learner's buffer .*buffer\.sqlite.*locked"):
        consume(buffer, records(vote("f1", "a")))
    other.execute("ROLLBACK")
    other.close()
    assert buffer.offsets() == {}
    consume(buffer, records(vote("f1", "a")))
    assert buffer.reason("f1") == ("waiting", None)


def test_offsets_belong_to_one_log(tmp_path: Path) -> None:
    for log in ("a", "b"):
        buffer = made(tmp_path / "b.sqlite", log)
        assert buffer.offsets() == {}
        consume(buffer, records(respond("a"), start=7))
        buffer.close()
    buffer = made(tmp_path / "b.sqlite", "a")
    assert buffer.offsets() == {(RESPONSES, 0): 8}
    buffer.close()


def test_it_is_blank_until_something_was_read_and_not_by_what_earlier_versions_learned(buffer: Buffer) -> None:
    assert buffer.blank
    buffer.learned(["f1", "f2"], "v1")
    assert buffer.blank
    consume(buffer, records(vote("f3", "a")))
    assert not buffer.blank


@pytest.mark.parametrize(
    "event",
    [
        vote("f1", "a", choice_index=2**63),
        vote("f1", "a", time=float("nan")),
        vote("f1", "a", time=float("inf")),
        respond("a").model_copy(update={"choices": [respond("a").choices[0].model_copy(update={"index": -(2**70)})]}),
    ],
)
def test_what_no_column_can_hold_is_refused_before_anything_is_stored(buffer: Buffer, event: Event) -> None:
    value = json.dumps(event.model_dump()).encode()
    record = Record(event.topic, 0, 0, message_of(event))
    with pytest.raises(ValueError, match=r"out of range|no time"):
        buffer.entry(Record(event.topic, 0, 0, type(record.message)("x", "x", 0.0, value)))


def test_the_counts_that_are_kept_are_those_that_a_count_gives(tmp_path: Path, buffer: Buffer) -> None:
    chance = random.Random(5)
    rating = [("up", False), ("down", False), (None, True)]
    for step in range(300):
        ids = [f"f{chance.randrange(60)}" for _ in range(3)]
        act = chance.randrange(6)
        if act == 0:
            consume(buffer, records(respond(f"r{chance.randrange(20)}")))
        elif act == 1:
            buffer.learned(ids, "v1")
        elif act == 2:
            buffer.give_back(ids)
        elif act == 3 and chance.random() < 0.2:
            buffer.set_aside(ids[0], "no number")
        else:
            how, retracted = chance.choice(rating)
            about = f"r{chance.randrange(20)}"
            consume(
                buffer,
                records(vote(ids[0], about, how, user=f"u{step % 3}", time=float(step), retracted=retracted)),
            )
        before = chance.uniform(0, 300)
        found = dict(buffer._db.execute("SELECT state, count(*) FROM votes GROUP BY state"))
        assert {state: n for state, n in buffer.counts().items() if n} == found
        assert buffer.count_ready(before) == (len(buffer.ready(True, before, 99)), len(buffer.ready(False, before, 99)))
    again = made(tmp_path / "buffer.sqlite")
    assert again.counts() == buffer.counts()
    again.close()


CALLS = {
    "ready": (True, 1.0, 9),
    "newest": (1.0, 9),
    "pairs": (1.0, 9),
    "count_pairs": (1.0,),
    "newest_pairs": (1.0, 9),
    "counts": (),
    "count_ready": (1.0,),
    "held_out_prompts": (9,),
    "count_held_out": (),
}


@pytest.mark.parametrize("call", ["consume and the like", *CALLS])
def test_no_question_that_a_poll_asks_reads_a_whole_table(buffer: Buffer, call: str) -> None:
    """What grows with the log is looked up by an index; the plans say so."""
    consume(buffer, records(respond("a"), respond("b", choices=said([6, 1])), respond("c", choices=said([7, 1]))))
    consume(buffer, records(vote("f1", "a", time=0.0), vote("f2", "b", "down", time=0.0)))
    asked: list[str] = []
    buffer._db.set_trace_callback(asked.append)
    if call not in CALLS:
        consume(buffer, records(respond("d", [9])))
        consume(buffer, records(vote("f3", "d"), vote("f4", "c", "down", preferred_over="a")))
        buffer.learned(["f1"], "v1")
        buffer.give_back(["f1"])
        buffer.set_aside("f1", "no number")
    else:
        getattr(buffer, call)(*CALLS[call])
    buffer._db.set_trace_callback(None)
    plans = [
        step[3]
        for statement in map(str.strip, asked)
        if statement.startswith(("SELECT", "UPDATE", "INSERT", "DELETE"))
        for step in buffer._db.execute(f"EXPLAIN QUERY PLAN {statement}")
    ]
    assert plans or call == "count_held_out"
    scans = [
        plan
        for plan in plans
        if plan.startswith("SCAN") and plan not in ("SCAN tally", "SCAN held_out", "SCAN pair_tally")
    ]
    assert scans == []
    assert not any("TEMP B-TREE" in plan for plan in plans if "tally" not in plan)


def test_a_buffer_of_the_release_before_is_brought_up_and_keeps_what_was_learned(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "b.sqlite", isolation_level=None)
    migrate(old, MIGRATIONS[:1])
    old.execute("INSERT INTO offsets VALUES (?, 0, 5)", (FEEDBACK,))
    old.execute("INSERT INTO responses VALUES ('a')")
    held = "its prompt is held out to measure KL"
    old.executemany(
        "INSERT INTO answers VALUES (?, 0, ?, ?, ?)",
        [("a", "[2, 3]", "[4, 5, 1]", None), ("b", "[9, 9]", "[1]", held), ("c", "[9, 9]", "[1]", held)],
    )
    old.executemany(
        "INSERT INTO votes VALUES (?, 'a', 0, ?, 1, 100.0, ?, NULL)", [("f1", "u1", "learned"), ("f2", "u2", "ready")]
    )
    old.close()
    buffer = made(tmp_path / "b.sqlite")
    assert buffer.offsets() == {}
    assert not buffer.blank
    assert buffer.held_out_prompts(9) == [[9, 9]]
    consume(buffer, records(respond("a"), respond("b", [9, 9])))
    consume(buffer, records(vote("f1", "a"), vote("f2", "a", user="u2")))
    assert [(e.feedback_id, e.prompt, e.completion) for e in buffer.ready(True, 1e9, 9)] == [("f2", [2, 3], [4, 5, 1])]
    assert buffer.counts() == {"learned": 1, "ready": 1, "set_aside": 0, "waiting": 0}
    buffer.close()


def test_a_buffer_of_the_second_layout_is_brought_up_and_its_votes_make_pairs(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "b.sqlite", isolation_level=None)
    migrate(old, MIGRATIONS[:2])
    old.execute("INSERT INTO offsets VALUES ('a', ?, 0, 5)", (FEEDBACK,))
    old.executemany("INSERT INTO responses VALUES (?)", [("a",), ("b",), ("c",), ("d",)])
    old.executemany(
        "INSERT INTO answers VALUES (?, 0, '[2,3]', ?, ?)",
        [("a", "[4,5,1]", None), ("b", "[6,1]", None), ("c", "[7,1]", None), ("d", "[]", "the completion is empty")],
    )
    old.executemany(
        "INSERT INTO votes VALUES (?, ?, 0, ?, ?, ?, ?, NULL)",
        [
            ("f1", "a", "u1", 1, 1.0, "learned"),
            ("f2", "a", "u2", 1, 2.0, "ready"),
            ("f3", "b", "u1", 0, 3.0, "ready"),
            ("f4", "d", "u1", 0, 4.0, "set_aside"),
            ("f5", "", "", None, 0.0, "learned"),
        ],
    )
    old.close()
    buffer = made(tmp_path / "b.sqlite")
    assert buffer.offsets() == {(FEEDBACK, 0): 5}
    (thumb,) = buffer.ready(True, 1e9, 9)
    assert (thumb.feedback_id, thumb.completion, thumb.behaviour, thumb.version) == ("f2", [4, 5, 1], [], "")
    assert [pair.feedback_ids for pair in buffer.pairs(1e9, 9)] == [("f2", "f3")]
    assert [thumb.feedback_id for thumb in buffer.newest(1e9, 9)] == ["f3", "f2", "f1"]
    consume(buffer, records(vote("f5", "c", time=5.0), vote("f6", "c", "down", user="u2", time=6.0), start=5))
    assert buffer.counts() == {"learned": 2, "ready": 3, "set_aside": 1, "waiting": 0}
    assert [thumb.feedback_id for thumb in buffer.newest(1e9, 9)] == ["f6", "f5", "f3", "f2", "f1"]
    buffer.learned(["f2", "f3"], "v2")
    assert buffer.count_pairs(1e9) == 0
    buffer.close()


def test_killed_between_the_migration_and_the_matching_it_matches_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = sqlite3.connect(tmp_path / "b.sqlite", isolation_level=None)
    migrate(old, MIGRATIONS[:2])
    old.executemany(
        "INSERT INTO answers VALUES (?, 0, '[2,3]', ?, NULL)",
        [("a", "[4,1]"), ("b", "[5,1]")],
    )
    old.executemany("INSERT INTO votes VALUES (?, ?, 0, 'u', ?, 1.0, 'ready', NULL)", [("f1", "a", 1), ("f2", "b", 0)])
    old.close()

    def dies(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("learner.pairing.Pairing._match", dies)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "b.sqlite")
    monkeypatch.undo()
    for _ in range(2):
        buffer = made(tmp_path / "b.sqlite")
        assert [pair.feedback_ids for pair in buffer.pairs(1e9, 9)] == [("f1", "f2")]
        buffer.close()


def test_a_thumb_brings_what_was_recorded_of_its_answer(buffer: Buffer) -> None:
    cut = respond("b", choices=said([4, 5], reason="length"), version="v3")
    consume(buffer, records(respond("a"), cut))
    consume(buffer, records(vote("f1", "a", user="me"), vote("f2", "b", time=101.0)))
    first, second = buffer.ready(True, 1e9, 9)
    assert (first.behaviour, first.version, first.user, first.ended) == ([-1.0, -2.0, -0.5], "base", "me", True)
    assert second.behaviour == pytest.approx([-0.4, -0.5])
    assert (second.version, second.ended) == ("v3", False)


@pytest.mark.parametrize(
    ("asked", "voted", "topic"),
    [
        ({}, {}, ""),
        ({"metadata": {"topic": "taxes"}}, {}, "taxes"),
        ({"metadata": {"topic": "taxes"}}, {"topic": "tone"}, "tone"),
        ({"metadata": {"topic": "taxes"}}, {"topic": 7}, "taxes"),
        ({"metadata": {"topic": ["taxes"]}}, {}, ""),
        ({"metadata": "topic"}, {"topic": "x" * 999}, "x" * TOPIC),
        ({"metadata": {"topic": "y" * 999}}, {}, "y" * TOPIC),
        ({"metadata": None}, {"topic": None}, ""),
    ],
)
def test_the_topic_is_the_vote_s_else_the_request_s(
    buffer: Buffer, asked: dict[str, object], voted: dict[str, object], topic: str
) -> None:
    consume(buffer, records(vote("f1", "a", metadata=voted)))
    consume(buffer, records(respond("a", request=asked)))
    assert [thumb.topic for thumb in buffer.ready(True, 1e9, 9)] == [topic]


def test_the_newest_are_those_that_stand_and_reading_them_spends_none(buffer: Buffer) -> None:
    buffer.learned(["f0", "f9"], "v1")  # before the log is read
    consume(buffer, records(*(respond(name) for name in "abcd"), respond("e", outcome="timeout")))
    assert buffer.newest(1e9, 9) == []
    consume(
        buffer,
        records(
            vote("f0", "a", time=1.0),
            vote("f1", "b", "down", time=2.0),
            vote("f2", "c", time=3.0),
            vote("f3", "c", None, retracted=True, time=4.0),
            vote("f4", "d", time=5.0),
            vote("f5", "e", time=6.0),
            vote("f6", "z", time=7.0),
        ),
    )
    buffer.learned(["f1"], "v2")
    for _ in range(2):
        assert [(t.feedback_id, t.up) for t in buffer.newest(1e9, 9)] == [("f4", True), ("f1", False), ("f0", True)]
    assert [thumb.feedback_id for thumb in buffer.newest(4.0, 1)] == ["f1"]
    assert buffer.count_ready(1e9) == (1, 0)
    buffer.set_aside("f1", "no number")
    assert [thumb.feedback_id for thumb in buffer.newest(1e9, 9)] == ["f4", "f0"]


def test_an_answer_whose_tokens_say_something_else_is_set_aside_and_its_vote_says_why(tmp_path: Path) -> None:
    def answer(text: str) -> list[Choice]:
        return [said([4, 5, 1])[0].model_copy(update={"text": text, "logprobs": [-1.0] * 3})]

    buffer = Buffer(tmp_path / "b.sqlite", VOCABULARY, lambda prompt: False, "a", Letters())
    consume(buffer, records(respond("a", choices=answer("cd")), respond("b", choices=answer("xy"))))
    consume(buffer, records(vote("f1", "a"), vote("f2", "b")))
    assert buffer.reason("f1") == ("ready", None)
    why = "the tokenizer has changed: the tokens say 'cd', and 'xy' was recorded"
    assert buffer.reason("f2") == ("set_aside", why)
    buffer.close()
