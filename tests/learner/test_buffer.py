"""Events, standings and offsets move together, and a replay changes nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from learner.buffer import Buffer
from tests.learner.conftest import VOCABULARY, respond, vote
from thumbwheel.errors import ThumbwheelError
from thumbwheel.events import FEEDBACK, RESPONSES, Event
from thumbwheel.log import Message, Record, message_of


def records(*events: Event, start: int = 0) -> list[Record]:
    """The events of one topic as they would lie on the log."""
    return [Record(event.topic, 0, start + i, message_of(event)) for i, event in enumerate(events)]


@pytest.fixture
def buffer(tmp_path: Path) -> Iterator[Buffer]:
    buffer = Buffer(tmp_path / "buffer.sqlite", VOCABULARY, lambda prompt: prompt == [9])
    yield buffer
    buffer.close()


def test_a_vote_and_its_response_make_an_example_whichever_comes_first(buffer: Buffer) -> None:
    buffer.consume(records(vote("f1", "a")))
    assert buffer.reason("f1") == ("waiting", None)
    buffer.consume(records(respond("a"), respond("b")))
    buffer.consume(records(vote("f2", "b", "down"), start=1))
    (up,), (down,) = buffer.ready(True, 100.0, 9), buffer.ready(False, 100.0, 9)
    assert (up.feedback_id, up.prompt, up.completion, up.up) == ("f1", [2, 3], [4, 5, 1], True)
    assert (down.feedback_id, down.up) == ("f2", False)
    assert (buffer.offset(RESPONSES), buffer.offset(FEEDBACK)) == (2, 2)


def test_a_vote_that_has_not_settled_is_not_ready(buffer: Buffer) -> None:
    buffer.consume(records(respond("a")))
    buffer.consume(records(vote("f1", "a", time=100.0)))
    assert buffer.count_ready(99.9) == (0, 0)
    assert buffer.count_ready(100.0) == (1, 0)


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    buffer = Buffer(tmp_path_factory.mktemp("b") / "b.sqlite", VOCABULARY, lambda prompt: prompt == [9])
    topics = [votes, answers] if votes_first else [answers, votes]
    for cut in [*cuts, 8]:  # each time again from the start, as after a kill between reading and committing
        for topic in topics:
            buffer.consume(topic[:cut])
    assert buffer.counts() == {"ready": 2, "set_aside": 4, "waiting": 1}
    assert [e.feedback_id for e in buffer.ready(True, 1e9, 9) + buffer.ready(False, 1e9, 9)] == ["f1", "f4"]
    buffer.close()


def test_an_error_within_a_batch_leaves_neither_events_nor_offset(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffer, "_join", lambda touched: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        buffer.consume(records(respond("a")))
    monkeypatch.undo()
    assert buffer.offset(RESPONSES) == 0
    buffer.consume(records(vote("f1", "a")))
    assert buffer.reason("f1") == ("waiting", None)


def test_a_learned_vote_is_never_ready_again(buffer: Buffer) -> None:
    buffer.consume(records(respond("a")))
    buffer.consume(records(vote("f1", "a")))
    buffer.learned(["f1"], "v1")
    buffer.consume(records(vote("f1", "a"), vote("f2", "a", "down", time=200.0)))
    assert buffer.count_ready(1e9) == (0, 0)
    assert buffer.reason("f1") == ("learned", "v1")
    state, reason = buffer.reason("f2") or ("", "")
    assert state == "set_aside"
    assert "earlier vote" in str(reason)


def test_a_new_buffer_knows_what_was_learned_before_it_reads_the_log(buffer: Buffer) -> None:
    buffer.learned(["f1"], "v1")
    buffer.consume(records(respond("a")))
    buffer.consume(records(vote("f1", "a"), vote("f2", "a", "down", time=200.0), vote("f3", "a", user="u2")))
    assert [example.feedback_id for example in buffer.ready(True, 1e9, 9)] == ["f3"]
    assert buffer.count_ready(1e9) == (1, 0)


def test_what_is_given_back_may_be_learned(buffer: Buffer) -> None:
    buffer.consume(records(respond("a")))
    buffer.consume(records(vote("f1", "a")))
    buffer.learned(["f1"], "v1")
    buffer.give_back(["f1"])
    assert buffer.count_ready(1e9) == (1, 0)


def test_an_answer_that_is_set_aside_stays_so(buffer: Buffer) -> None:
    buffer.consume(records(respond("a")))
    buffer.consume(records(vote("f1", "a")))
    buffer.set_aside("f1", "no number")
    buffer.consume(records(vote("f2", "a", user="u2"), start=1))
    assert buffer.reason("f1") == buffer.reason("f2") == ("set_aside", "no number")


def test_an_unreadable_record_is_passed_and_kept(buffer: Buffer) -> None:
    buffer.consume([Record(FEEDBACK, 0, 0, Message("x", "x", 0.0, b"no event"))])
    assert buffer.offset(FEEDBACK) == 1


def test_held_out_prompts_come_once_each(buffer: Buffer) -> None:
    buffer.consume(records(respond("a", [9]), respond("b", [9]), respond("c")))
    assert buffer.held_out_prompts() == [[9]]


def test_a_file_that_is_no_buffer_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a database, and long enough to be told apart from one" * 20)
    with pytest.raises(ThumbwheelError, match="cannot open the learner's buffer"):
        Buffer(tmp_path / "x", VOCABULARY, lambda prompt: False)
