from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.thumbwheel.samples import EVERY, put, response, vote
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, TOPICS, Event, encode
from thumbwheel.log import Message, Record, SqliteLog, message_of
from thumbwheel.log.tail import Filter, Tail, as_json, line, local, look, moment, plain


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SqliteLog]:
    made = SqliteLog(tmp_path / "log.sqlite")
    yield made
    made.close()


def record(event: Event) -> Record:
    return Record(event.topic, 0, 7, message_of(event))


def of_bytes(value: bytes, key: str = "k") -> Record:
    return Record(FEEDBACK, 2, 7, Message("i", key, 5.0, value))  # a vote is what belongs there


def test_topics_come_merged_by_time_and_only_what_is_new_comes_again(log: SqliteLog) -> None:
    put(log, *(vote(f"r{i}", time=2.0 * i) for i in range(450)), *(response(f"r{i}", 2.0 * i + 1) for i in range(450)))
    reader = Tail(log, TOPICS, lambda topic, partition: 0)
    times = [one.message.time for one in reader.fresh()]
    assert times == [float(i) for i in range(900)]
    assert list(reader.fresh()) == []
    put(log, vote("late", time=1.0))
    assert [one.message.key for one in reader.fresh()] == ["late"]


def test_it_begins_where_it_is_told_to(log: SqliteLog) -> None:
    put(log, *(vote(f"r{i}") for i in range(5)))
    reader = Tail(log, [FEEDBACK], lambda topic, partition: log.ends(topic, partition)[1] - 2)
    assert [one.message.key for one in reader.fresh()] == ["r3", "r4"]


def test_a_log_that_fails_in_the_middle_is_read_on_behind_what_was_given(log: SqliteLog) -> None:
    put(log, *(vote(f"r{i}") for i in range(250)))

    class Failing(SqliteLog):
        left = 1

        def read(self, topic: str, offset: int, limit: int = 500, partition: int = 0) -> list[Record]:
            if self.left == 0 and offset > 0:
                self.left = -1
                raise LogError("away")
            self.left -= 1
            return super().read(topic, offset, limit, partition)

    failing = Failing(log.path)
    reader = Tail(failing, [FEEDBACK], lambda topic, partition: 0)
    fresh = reader.fresh()
    given = [next(fresh).offset for _ in range(200)]
    with pytest.raises(LogError, match="away"):
        next(fresh)
    given += [one.offset for one in reader.fresh()]
    assert given == list(range(250))
    failing.close()


@pytest.mark.parametrize(
    ("event", "words"),
    list(
        zip(
            EVERY,
            [
                ["response.generated", "r1", "v1", "completed", "2 tokens", '"Paris"'],
                ["feedback.submitted", "r1", "down", "too long", "größer ✓", "by ab12cd34"],
                ["candidate.submitted", "v2", "kto", "64 votes", "from v1", "1.50"],
                ["evaluation.reported", "v2", "fail", "2 checks", "refusals fail"],
                ["candidate.approved", "by force", "ann", "read 20 answers"],
                ["candidate.rejected", "v3", "ann", "curt"],
                ["adapter.promoted", "v2", "controller", "before: v1"],
                ["adapter.rolled_back", "v1", "from v2", "complaints"],
                ["replica.reported", "r1 leaves", "v3 failed"],
            ],
            strict=True,
        )
    ),
    ids=lambda value: getattr(value, "type", ""),
)
def test_a_line_says_when_what_about_which_version_and_the_words_that_matter(event: Event, words: list[str]) -> None:
    said = line(look(record(event)))
    assert said.startswith(local(event.time))
    assert [word for word in words if word not in said] == []


def test_an_answer_cannot_write_to_the_terminal() -> None:
    said = line(look(record(response(text="a\x1b[2J\x07\r\nb\u202ec \u200d"))))
    assert said.isprintable() or "\u200d" in said
    assert not set(said) & {"\x1b", "\x07", "\r", "\n", "\u202e"}
    assert plain("x\ty\udcff") == "x y\\udcff"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"type": "nothing.known"}', "nothing.known"),
        (encode(vote()).replace(b'"schema_version":"1.0"', b'"schema_version":"2.0"'), "2.0"),
        (b"[" * 100_000, "JSON"),
        (encode(EVERY[8]), "does not belong"),
    ],
)
def test_what_cannot_be_read_is_shown_with_its_place_and_why(value: bytes, why: str) -> None:
    seen = look(of_bytes(value, "k\udcff"))
    assert why.casefold() in line(seen).casefold()
    assert f"{FEEDBACK} partition 2 offset 7" in line(seen)
    assert "UNREADABLE" in line(seen)
    shown = as_json(seen)
    assert (shown["partition"], shown["offset"], shown["key"]) == (2, 7, "k\udcff")
    assert "unreadable" in shown
    assert ("value_base64" in shown) == (value == b"\xff\xfe")


def test_json_keeps_fields_that_this_release_does_not_know() -> None:
    known = record(vote())
    newer = replace(known, message=replace(known.message, value=known.message.value[:-1] + b',"colour":"red"}'))
    shown = as_json(look(newer))
    assert list(shown)[:3] == ["topic", "partition", "offset"]
    assert shown["colour"] == "red"


@pytest.mark.parametrize(
    ("chosen", "keys"),
    [
        (Filter(), ["r1", "r2", "v2", "r1"]),
        (Filter(key="r1"), ["r1", "r1"]),
        (Filter(type="feedback.submitted"), ["r2"]),
        (Filter(version="v1"), ["r1", "r1"]),
        (Filter(version="v2"), ["v2"]),
        (Filter(user="beef"), ["r2"]),
        (Filter(grep="GRÖSSE"), ["r2"]),
        (Filter(grep='say "hi"'), ["r1"]),
        (Filter(grep="feedback.submitted", key="r1"), []),
    ],
)
def test_filters_take_what_they_say(chosen: Filter, keys: list[str]) -> None:
    events = [response(text='Now say "hi"\nand go'), vote("r2", user="beef01", comment="Größe"), EVERY[2], EVERY[8]]
    assert [event.key for event in events if chosen.takes(look(record(event)))] == keys


def test_text_is_also_found_in_what_cannot_be_read() -> None:
    assert Filter(grep="needle").takes(look(of_bytes(b"\xff hay needle hay")))
    assert not Filter(grep="needle", type="feedback.submitted").takes(look(of_bytes(b"needle")))


def test_a_time_is_an_age_or_an_iso_time() -> None:
    assert moment("10m", 1000.0) == 400.0
    assert moment("2h", 10_000.0) == 2800.0
    assert moment("1.5d", 200_000.0) == 70_400.0
    assert moment("45s", 100.0) == 55.0
    assert moment("1970-01-01T00:00:10Z", 0.0) == 10.0
    assert moment("1970-01-01T02:00:10.5+02:00", 0.0) == 10.5
    assert moment(local(86_400.25), 0.0) == 86_400.25


@pytest.mark.parametrize("text", ["", "yesterday", "10", "10 minutes", "-5m", "2026-13-01", "m"])
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"10m, 2h"):
        moment(text, 0.0)


def test_a_time_out_of_this_world_is_still_shown() -> None:
    assert local(1e20) == "1e+20 s"
    assert local(float("nan")) == "nan s"


def test_versions_of_replicas_are_those_that_they_serve() -> None:
    assert look(record(EVERY[8])).version == "v1"
    assert look(record(vote())).version == ""
