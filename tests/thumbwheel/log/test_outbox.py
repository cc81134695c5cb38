"""The outbox: what waits keeps its order, the file has an end, and no vote pays for it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT
from thumbwheel.log.deadletter import dlq
from thumbwheel.log.outbox import FORWARDER, HEADROOM, Outbox
from thumbwheel.log.port import Message, read_all

pytestmark = pytest.mark.slow

LIMIT = 2_000_000
Open = Callable[..., Outbox]


def response(number: int, size: int = 2000) -> Message:
    return Message(f"response-{number}", f"chatcmpl-{number}", 1000.0 + number, b"r" * size)


def vote(number: int, size: int = 300, time: float | None = None) -> Message:
    """On the response of that number."""
    return Message(f"vote-{number}", f"chatcmpl-{number}", 1000.5 + number if time is None else time, b"v" * size)


def responses(*numbers: int, size: int = 2000) -> list[Message]:
    return [response(number, size) for number in numbers]


def numbers(outbox: Outbox, topic: str = RESPONSES) -> list[int]:
    """Of the messages that are there, in their order."""
    return [int(record.message.id.rpartition("-")[2]) for record in read_all(outbox, topic)]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the outbox of this test, again and again if need be."""
    made = []

    def open_one(limit: int = LIMIT) -> Outbox:
        made.append(Outbox(tmp_path / "outbox.sqlite", limit))
        return made[-1]

    yield open_one
    for outbox in made:
        outbox.close()


def fill(outbox: Outbox, topic: str, make: Callable[[int], Message], start: int = 0) -> int:
    """Append until no more is taken, not even one; returns the number that was refused."""
    number = start
    for at_once in (50, 1):
        with contextlib.suppress(LogError):
            while True:
                outbox.append(topic, [make(number + more) for more in range(at_once)])
                number += at_once
    return number


def test_order_and_offsets_stay_after_what_was_sent_is_deleted(opened: Open) -> None:
    outbox = opened()
    outbox.append(RESPONSES, responses(*range(10)))
    first = outbox.next(RESPONSES, 4, 10**6)
    assert [record.offset for record in first] == [0, 1, 2, 3]
    outbox.sent(RESPONSES, first[-1])
    assert outbox.ends(RESPONSES) == (4, 10)
    outbox.append(RESPONSES, responses(10))
    reopened = opened()
    following = reopened.next(RESPONSES, 100, 10**6)
    assert [record.offset for record in following] == list(range(4, 11))
    assert [record.message for record in following] == responses(*range(4, 11))
    outbox.sent(RESPONSES, following[-1])
    assert outbox.next(RESPONSES, 100, 10**6) == []
    assert outbox.append(RESPONSES, responses(11))[0].offset == 11


def test_what_is_next_is_bounded_by_rows_and_by_bytes_and_a_huge_message_goes_alone(opened: Open) -> None:
    outbox = opened()
    outbox.append(RESPONSES, [response(0, 100), response(1, 100), response(2, 5000), response(3, 100)])

    def following(limit: int, size: int) -> list[int]:
        return [record.offset for record in outbox.next(RESPONSES, limit, size)]

    assert following(1, 10**6) == [0]
    assert following(9, 200) == [0, 1]
    assert following(9, 5199) == [0, 1]
    assert following(9, 5200) == [0, 1, 2]
    outbox.sent(RESPONSES, outbox.next(RESPONSES, 2, 10**6)[-1])
    assert following(9, 200) == [2]
    assert following(9, 0) == [2]


def test_a_vote_stays_after_it_was_sent_so_that_its_id_is_known_and_is_forgotten_in_time(opened: Open) -> None:
    outbox = opened()
    outbox.append(FEEDBACK, [vote(number) for number in range(500)])
    outbox.sent(FEEDBACK, outbox.next(FEEDBACK, 300, 10**6)[-1])
    assert outbox.waiting(FEEDBACK) == (200, 1300.5)
    assert outbox.append(FEEDBACK, [vote(7)])[0].duplicate
    outbox.forget(1250.0)
    assert numbers(outbox, FEEDBACK) == list(range(250, 500))
    outbox.forget(10_000.0)
    assert numbers(outbox, FEEDBACK) == list(range(300, 500)), "one that Kafka has not got was forgotten"


def test_over_the_limit_the_oldest_without_a_vote_go_first_and_then_the_oldest_with_one(opened: Open) -> None:
    outbox = opened(10**9)
    outbox.append(ROLLOUT, [Message("report-0", "r1", 1.0, b"{}")])
    outbox.append(RESPONSES, responses(*range(900)))
    voted = list(range(0, 900, 3))
    outbox.append(FEEDBACK, [vote(number) for number in voted])
    outbox.limit = LIMIT
    assert outbox.bytes() > LIMIT
    dropped = outbox.trim()
    assert LIMIT * 0.95 < outbox.bytes() <= LIMIT
    without = sorted(set(range(900)) - set(voted))
    assert 100 < dropped < 600
    assert numbers(outbox) == sorted(voted + without[dropped:])
    outbox.close()
    smaller = opened(1_000_000)
    rest = smaller.trim()
    assert dropped + rest > 600
    assert numbers(smaller) == voted[dropped + rest - 600 :]
    assert numbers(smaller, FEEDBACK) == voted
    assert numbers(smaller, ROLLOUT) == [0]


def test_what_was_dropped_is_counted_by_topic_and_reason_and_the_count_survives(opened: Open) -> None:
    outbox = opened()
    outbox.append(RESPONSES, responses(*range(900)))
    dropped = outbox.trim()
    outbox.shelve(RESPONSES, response(899))
    outbox.append(FEEDBACK, [vote(0), vote(1)])
    outbox.shelve(FEEDBACK, vote(0))
    outbox.shelve(FEEDBACK, vote(1))
    outbox.close()
    assert set(opened().dropped()) == {
        (RESPONSES, "outbox_full", dropped),
        (RESPONSES, "too_large", 1),
        (FEEDBACK, "too_large", 2),
    }


def test_what_is_shelved_leaves_the_queue_and_lies_among_the_dead_letters(opened: Open) -> None:
    outbox = opened()
    outbox.append(FEEDBACK, [vote(number) for number in range(3)])
    outbox.shelve(FEEDBACK, vote(1))
    assert [record.message for record in outbox.next(FEEDBACK, 9, 10**6)] == [vote(0), vote(2)]
    assert [record.message for record in outbox.read(dlq(FEEDBACK), 0)] == [vote(1)]


def test_when_votes_alone_fill_the_file_they_are_refused_by_the_setting_until_kafka_took_what_waits(
    opened: Open,
) -> None:
    outbox = opened()
    outbox.append(RESPONSES, responses(*range(300)))
    refused = fill(outbox, FEEDBACK, vote)
    assert numbers(outbox) == [], "a vote was refused before every response had gone"
    assert numbers(outbox, FEEDBACK) == list(range(refused))
    assert outbox.bytes() <= LIMIT * (HEADROOM + 0.01)
    with pytest.raises(LogError, match=r"\[log\] outbox_max_bytes, 2000000"):
        outbox.append(FEEDBACK, [vote(refused)])
    assert outbox.trim() == 0
    while waiting := outbox.next(FEEDBACK, 1000, 10**6):
        outbox.sent(FEEDBACK, waiting[-1])
    assert len(numbers(outbox, FEEDBACK)) == refused
    outbox.append(FEEDBACK, [vote(refused)])
    outbox.trim()
    assert outbox.bytes() <= LIMIT
    assert outbox.waiting(FEEDBACK)[0] == 1


def test_a_full_file_can_be_emptied_and_takes_as_much_again(opened: Open, tmp_path: Path) -> None:
    """Deleting needs room in SQLite's journal alone: nothing is stuck at the end of the file."""
    outbox = opened()
    for _ in range(3):
        start = outbox.ends(FEEDBACK)[1]
        assert fill(outbox, FEEDBACK, vote, start) - start > 2000
        for size in (1, 50, 10_000):
            outbox.sent(FEEDBACK, outbox.next(FEEDBACK, size, 10**7)[-1])
        outbox.forget(10**9)
    assert numbers(outbox, FEEDBACK) == []
    assert (tmp_path / "outbox.sqlite").stat().st_size <= LIMIT * HEADROOM * 1.05


def test_an_append_makes_room_itself_where_nobody_trims(opened: Open) -> None:
    outbox = opened()
    for number in range(0, 5000, 50):
        outbox.append(RESPONSES, responses(*range(number, number + 50)))
    kept = numbers(outbox)
    assert kept == list(range(5000 - len(kept), 5000)), "others than the oldest went"
    assert len(kept) > 400
    assert outbox.bytes() <= LIMIT * (HEADROOM + 0.1)
    assert outbox.dropped() == [(RESPONSES, "outbox_full", 5000 - len(kept))]


def test_votes_that_kafka_has_go_before_anything_that_waits(opened: Open) -> None:
    outbox = opened()
    outbox.append(FEEDBACK, [vote(number) for number in range(4000)])
    outbox.sent(FEEDBACK, outbox.next(FEEDBACK, 4000, 10**9)[-1])
    outbox.append(RESPONSES, responses(*range(5000, 5400)))
    assert outbox.bytes() > LIMIT
    assert outbox.trim() == 0
    assert outbox.bytes() <= LIMIT
    assert numbers(outbox) == list(range(5000, 5400))
    assert numbers(outbox, FEEDBACK)[-1] == 3999


def test_a_vote_that_kafka_has_still_protects_its_response_while_that_waits(opened: Open) -> None:
    outbox = opened(10**9)
    outbox.append(RESPONSES, responses(*range(900)))
    outbox.append(FEEDBACK, [vote(number) for number in range(0, 900, 10)])
    outbox.sent(FEEDBACK, outbox.next(FEEDBACK, 900, 10**9)[-1])
    outbox.limit = LIMIT
    assert outbox.trim() > 100
    assert set(numbers(outbox)) >= set(range(0, 900, 10))


def test_what_was_shelved_does_not_keep_votes_out(opened: Open) -> None:
    outbox = opened()
    for number in range(20):
        outbox.append(RESPONSES, [response(number, 95_000)])
        outbox.shelve(RESPONSES, response(number, 95_000))
    assert fill(outbox, FEEDBACK, vote) > 2000
    assert numbers(outbox, dlq(RESPONSES)) == []


def test_a_vote_does_not_wait_while_many_responses_are_dropped(opened: Open) -> None:
    """100,000 wait, the older half of them with a vote, and thousands are too many."""
    outbox = opened(10**9)
    for start in range(0, 100_000, 10_000):
        outbox.append(RESPONSES, responses(*range(start, start + 10_000), size=100))
    outbox.append(FEEDBACK, [vote(number, 100) for number in range(50_000)])
    outbox.limit = outbox.bytes() - 1_500_000
    waits = []
    ended = threading.Event()

    def keep_voting() -> None:
        other = opened(10**9)
        number = 200_000
        while not ended.is_set():
            began = time.perf_counter()
            other.append(FEEDBACK, [vote(number)])
            waits.append(time.perf_counter() - began)
            number += 1
            time.sleep(0.002)

    voting = threading.Thread(target=keep_voting)
    voting.start()
    began = time.perf_counter()
    dropped = outbox.trim()
    took = time.perf_counter() - began
    ended.set()
    voting.join()
    assert 2000 < dropped < 20_000
    assert numbers(outbox)[:50_000] == list(range(50_000))
    assert took < 6
    assert len(waits) > 20
    assert max(waits) < 0.5, f"a vote waited for {max(waits):.3f} s"
    print(f"dropped {dropped} in {took:.2f} s; the longest of {len(waits)} waits was {max(waits) * 1000:.0f} ms")


def test_the_search_for_votes_uses_their_index(opened: Open) -> None:
    """Without it each response that is looked at would cost a look at every vote."""
    from thumbwheel.log.outbox import _WITHOUT_VOTE

    db = opened()._connection()
    plan = db.execute(
        f'EXPLAIN QUERY PLAN SELECT "offset" FROM events WHERE topic = ? AND {_WITHOUT_VOTE} ORDER BY "offset"',
        (RESPONSES,),
    ).fetchall()
    assert any("votes_by_key" in row[3] for row in plan), plan
    assert not any("TEMP B-TREE" in row[3] for row in plan), plan


def test_what_waits_is_told_with_the_time_of_the_oldest(opened: Open) -> None:
    outbox = opened()
    assert outbox.waiting(RESPONSES) == (0, 0.0)
    outbox.append(RESPONSES, responses(3, 4, 5))
    assert outbox.waiting(RESPONSES) == (3, 1003.0)
    outbox.sent(RESPONSES, outbox.next(RESPONSES, 1, 10**6)[-1])
    assert outbox.waiting(RESPONSES) == (2, 1004.0)
    assert outbox.committed(FORWARDER, RESPONSES) == 1
