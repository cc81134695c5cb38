"""A vote is in one pair at most, whichever comes first, and what is spent does not come back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from learner.buffer import Buffer
from learner.examples import Pair, spent
from learner.pairing import WINDOW
from tests.learner.conftest import VOCABULARY, Letters, respond, vote
from thumbwheel.events import Choice, Event, FeedbackSubmitted, ResponseGenerated
from thumbwheel.log import Record, message_of

END = 1


def made(path: Path, **named: Any) -> Buffer:
    return Buffer(path, VOCABULARY, lambda prompt: prompt == [9], "a", **{"tokens": Letters(), **named})


@pytest.fixture
def buffer(tmp_path: Path) -> Iterator[Buffer]:
    buffer = made(tmp_path / "buffer.sqlite")
    yield buffer
    buffer.close()


def tokens(text: str) -> list[int]:
    return Letters().encode_turn(text)


def answer(id: str, text: str, prompt: list[int] | None = None, **changes: Any) -> ResponseGenerated:
    choice = Choice(
        index=0, text=text, finish_reason="stop", token_ids=tokens(text), logprobs=[-1.0] * len(tokens(text))
    )
    return respond(id, prompt, **{"choices": [choice], **changes})


def tell(buffer: Buffer, *events: Event) -> None:
    """What comes in one batch, in this order."""
    for i, event in enumerate(events):
        record = Record(event.topic, 0, i, message_of(event))
        buffer.consume([buffer.entry(record)], record)


def all_of(buffer: Buffer) -> list[Pair]:
    pairs = buffer.pairs(1e9, 99)
    assert buffer.count_pairs(1e9) == len(pairs)
    return pairs


def test_a_correction_is_better_than_the_answer_whatever_the_thumb_says(buffer: Buffer) -> None:
    tell(buffer, answer("a", "bad"), vote("f1", "a", "up", correction=" good\n"))
    assert all_of(buffer) == [Pair(("f1",), [2, 3], tokens("good"), tokens("bad"), "correction")]
    (thumb,) = buffer.ready(True, 1e9, 9)
    assert thumb.completion == tokens("bad")


@pytest.mark.parametrize("text", ["", "  \n", "bad", " bad "])
def test_a_correction_that_corrects_nothing_makes_no_pair_and_the_thumb_stays(buffer: Buffer, text: str) -> None:
    tell(buffer, answer("a", "bad"), vote("f1", "a", correction=text))
    assert all_of(buffer) == []
    assert buffer.count_ready(1e9) == (1, 0)


@pytest.mark.parametrize(("length", "pairs"), [(1023, 1), (1024, 0)])
def test_a_correction_may_have_four_times_the_tokens_of_a_middling_answer(
    buffer: Buffer, length: int, pairs: int
) -> None:
    tell(buffer, answer("a", "bad"), vote("f1", "a", correction="x" * length))  # and the end
    assert len(all_of(buffer)) == pairs


def test_a_correction_may_have_four_times_the_tokens_of_a_long_answer(buffer: Buffer) -> None:
    tell(buffer, answer("a", "b" * 299), vote("f1", "a", correction="x" * 1199))
    tell(buffer, answer("b", "b" * 299), vote("f2", "b", correction="x" * 1200))
    assert spent(all_of(buffer)) == ["f1"]


def test_a_correction_outside_of_the_vocabulary_makes_no_pair(buffer: Buffer) -> None:
    tell(buffer, answer("a", "bad"), vote("f1", "a", correction="gööd"))
    assert all_of(buffer) == []


def test_without_a_tokenizer_corrections_make_no_pairs(tmp_path: Path) -> None:
    buffer = made(tmp_path / "b.sqlite", tokens=None)
    tell(buffer, answer("a", "bad"), vote("f1", "a", correction="good"))
    assert all_of(buffer) == []
    buffer.close()


def test_what_is_no_whole_turn_of_text_is_not_corrected(buffer: Buffer) -> None:
    tell(buffer, answer("a", "bad", endpoint="completions"), vote("f1", "a", correction="good"))
    reasoned = Choice(index=0, text="bad", finish_reason="stop", token_ids=tokens("hmbad"), logprobs=[-1.0] * 6)
    tell(buffer, answer("b", "bad", choices=[reasoned]), vote("f2", "b", correction="good"))
    assert all_of(buffer) == []
    assert buffer.count_ready(1e9) == (2, 0)


def test_an_answer_is_better_than_the_sibling_that_it_is_preferred_over_and_only_its_own_vote_is_spent(
    buffer: Buffer,
) -> None:
    tell(buffer, vote("f1", "a", preferred_over="b"), answer("a", "yes"), vote("f2", "b", time=101.0))
    assert all_of(buffer) == []
    tell(buffer, answer("b", "no"))
    assert all_of(buffer) == [Pair(("f1",), [2, 3], tokens("yes"), tokens("no"), "preferred")]
    buffer.learned(["f1"], "v1")
    assert all_of(buffer) == []
    assert buffer.reason("f2") == ("ready", None)


@pytest.mark.parametrize(
    "sibling",
    [
        answer("b", "no", [2, 4]),
        answer("b", "yes"),
        answer("b", "no", outcome="timeout"),
        answer("b", "no", untrainable="a grammar"),
        answer("c", "no"),
    ],
)
def test_a_sibling_has_to_be_there_be_sound_and_have_answered_the_same_otherwise(
    buffer: Buffer, sibling: ResponseGenerated
) -> None:
    tell(buffer, answer("a", "yes"), sibling, vote("f1", "a", preferred_over="b"))
    assert all_of(buffer) == []
    assert buffer.count_ready(1e9) == (1, 0)


def test_a_sibling_that_is_set_aside_takes_its_pairs_with_it(buffer: Buffer) -> None:
    tell(buffer, answer("a", "yes"), answer("b", "no"), vote("f1", "a", preferred_over="b"), vote("f2", "b", user="u2"))
    assert spent(all_of(buffer)) == ["f1"]
    buffer.set_aside("f2", "no number")
    assert all_of(buffer) == []
    assert buffer.reason("f1") == ("ready", None)


def test_an_up_and_a_down_on_one_prompt_make_a_pair_and_both_are_spent(buffer: Buffer) -> None:
    tell(buffer, answer("a", "yes"), answer("b", "no"), vote("f1", "a"), vote("f2", "b", "down", user="u2"))
    assert all_of(buffer) == [Pair(("f1", "f2"), [2, 3], tokens("yes"), tokens("no"), "votes")]
    buffer.learned(["f1", "f2"], "v1")
    assert all_of(buffer) == []
    buffer.give_back(["f1", "f2"])
    assert len(all_of(buffer)) == 1


def test_the_same_words_twice_are_one_answer(buffer: Buffer) -> None:
    tell(buffer, answer("a", "yes"), answer("b", "yes"), vote("f1", "a"), vote("f2", "b", "down"))
    assert all_of(buffer) == []


def test_a_vote_that_is_spent_alone_leaves_its_partner_to_another(buffer: Buffer) -> None:
    tell(buffer, *(answer(name, name) for name in "abc"))
    tell(buffer, vote("f1", "a", time=1.0), vote("f2", "b", "down", time=2.0), vote("f3", "c", time=3.0))
    assert [pair.feedback_ids for pair in all_of(buffer)] == [("f1", "f2")]
    buffer.learned(["f1"], "v1")
    assert [pair.feedback_ids for pair in all_of(buffer)] == [("f3", "f2")]
    tell(buffer, vote("f4", "b", None, retracted=True, time=9.0))
    assert all_of(buffer) == []


def test_a_pair_is_not_there_before_its_later_vote_has_settled(buffer: Buffer) -> None:
    tell(buffer, answer("a", "a"), answer("b", "b"), vote("f1", "a", time=1.0), vote("f2", "b", "down", time=5.0))
    assert (buffer.count_pairs(4.9), buffer.pairs(4.9, 9)) == (0, [])
    assert (buffer.count_pairs(5.0), len(buffer.pairs(5.0, 9))) == (1, 1)


def test_the_newest_pairs_are_there_again_after_they_were_learned(buffer: Buffer) -> None:
    tell(buffer, *(answer(name, name) for name in "abcd"), answer("e", "e", [5, 5]))
    tell(
        buffer,
        vote("f1", "a", time=1.0),
        vote("f2", "b", "down", time=2.0),
        vote("f3", "c", time=3.0, correction="x"),
        vote("f4", "d", time=4.0, preferred_over="a"),
        vote("f5", "e", "down", time=5.0),
    )
    newest = buffer.newest_pairs(1e9, 9)
    assert [(pair.kind, *pair.feedback_ids) for pair in newest] == [
        ("preferred", "f4"),
        ("correction", "f3"),
        ("votes", "f1", "f2"),
    ]
    buffer.learned(["f1", "f2", "f3", "f4"], "v1")
    assert all_of(buffer) == []
    assert buffer.newest_pairs(1e9, 9) == newest
    assert buffer.newest_pairs(1e9, 2) == newest[:2]
    assert buffer.newest_pairs(3.0, 9) == newest[1:]


def test_votes_that_were_learned_before_the_log_was_read_are_in_no_pair_but_the_newest(buffer: Buffer) -> None:
    buffer.learned(["f1", "f3"], "v1")
    tell(buffer, vote("f1", "a"), vote("f2", "b", "down"), vote("f3", "c", correction="x"))
    assert buffer.newest_pairs(1e9, 9) == []
    tell(buffer, *(answer(name, name) for name in "abc"))
    assert all_of(buffer) == []
    assert {pair.kind for pair in buffer.newest_pairs(1e9, 9)} == {"votes", "correction"}


def test_an_error_within_a_batch_leaves_the_pairs_as_they_were(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(buffer, answer("a", "a"), answer("b", "b"), vote("f1", "a"), vote("f2", "b", "down"))
    before = all_of(buffer)
    monkeypatch.setattr(buffer._pairing, "_match", lambda prompts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tell(buffer, vote("f3", "a", correction="x", time=101.0))
    monkeypatch.undo()
    assert all_of(buffer) == before
    tell(buffer, vote("f3", "a", correction="x", time=101.0))
    assert [pair.kind for pair in all_of(buffer)] == ["correction"]


def test_the_pairs_are_those_of_before_when_the_file_is_opened_again(tmp_path: Path, buffer: Buffer) -> None:
    tell(buffer, *(answer(name, name) for name in "abc"))
    tell(buffer, vote("f1", "a"), vote("f2", "b", "down"), vote("f3", "c", correction="x"))
    before = all_of(buffer)
    again = made(tmp_path / "buffer.sqlite")
    assert (len(before), all_of(again)) == (2, before)
    again.close()


# --- any order ---

RESPONSES = st.lists(
    st.builds(
        lambda id, text, prompt, sound: answer(id, text, prompt, **({} if sound else {"outcome": "timeout"})),
        st.sampled_from("abcde"),
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from([[2, 3], [2, 4], [9]]),
        st.sampled_from([True, True, True, False]),
    ),
    unique_by=lambda event: event.response_id,
    max_size=5,
)
VOTES = st.lists(
    st.builds(
        lambda id, about, rating, time, user, extra: vote(
            f"f{id}", about, rating, time=time, user=user, retracted=rating is None, **extra
        ),
        st.integers(0, 20),
        st.sampled_from("abcde"),
        st.sampled_from(["up", "down", "up", "down", None]),
        st.sampled_from([1.0, 2.0, 3.0]),
        st.sampled_from(["u", "v", "w"]),
        st.sampled_from([{}, {}, {}, {"correction": "x"}, {"correction": "w"}, {"preferred_over": "a"}]),
    ),
    unique_by=lambda event: event.id,
    max_size=14,
)


def expected(
    buffer: Buffer, responses: list[ResponseGenerated], votes: list[FeedbackSubmitted]
) -> set[tuple[str, ...]]:
    """The rules again, by looking at everything."""
    there = {event.response_id: event for event in responses if event.outcome == "completed"}
    pairs: set[tuple[str, ...]] = set()
    waiting: list[FeedbackSubmitted] = []
    for cast in sorted(votes, key=lambda cast: (cast.time, cast.id)):
        if buffer.reason(cast.id) != ("ready", None):
            continue
        mine, other = there[cast.response_id], there.get(cast.preferred_over or "")
        said = mine.choices[0].text
        if (cast.correction and cast.correction != said) or (
            other and other.prompt_token_ids == mine.prompt_token_ids and other.choices[0].text != said
        ):
            pairs.add((cast.id,))
        else:
            for early in waiting:
                sibling = there[early.response_id]
                alike = sibling.prompt_token_ids == mine.prompt_token_ids and early.rating != cast.rating
                if alike and sibling.choices[0].text != said:
                    waiting.remove(early)
                    pairs.add((cast.id, early.id) if cast.rating == "up" else (early.id, cast.id))
                    break
            else:
                waiting.append(cast)
    return pairs


@hypothesis_settings(max_examples=50)
@given(responses=RESPONSES, votes=VOTES, data=st.data())
def test_pairs_follow_from_what_is_there_and_not_from_its_order_and_none_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    responses: list[ResponseGenerated],
    votes: list[FeedbackSubmitted],
    data: st.DataObject,
) -> None:
    place = tmp_path_factory.mktemp("b")
    one, two = made(place / "1.sqlite"), made(place / "2.sqlite")
    for buffer in (one, two):
        buffer._db.execute("PRAGMA synchronous=OFF")
    early = data.draw(st.sets(st.sampled_from([cast.id for cast in votes]))) if votes else set()
    one.learned(sorted(early), "v0")
    tell(one, *responses, *votes)
    tell(two, *data.draw(st.permutations([*votes, *responses])), *votes[:3])
    two.learned(sorted(early), "v0")
    for before in (1.0, 2.0, 1e9):
        assert one.pairs(before, 99) == two.pairs(before, 99)
        assert one.newest_pairs(before, 99) == two.newest_pairs(before, 99)
        assert one.newest(before, 99) == two.newest(before, 99)
        assert one.count_pairs(before) == len(one.pairs(before, 99))
    used: set[str] = set(early)
    assert {pair.feedback_ids for pair in one.pairs(1e9, 99)} == expected(one, responses, votes)
    while pairs := one.pairs(1e9, data.draw(st.integers(1, 3))):
        ids = spent(pairs)
        assert len(ids) == len(set(ids))
        assert not used & set(ids)
        assert all(pair.chosen != pair.rejected for pair in pairs)
        used.update(ids)
        one.learned(ids, "v1")
        assert {pair.feedback_ids for pair in one.pairs(1e9, 99)} == expected(one, responses, votes)
    one.give_back(sorted(used - early))
    assert one.pairs(1e9, 99) == two.pairs(1e9, 99)
    one.close()
    two.close()


# --- however much there is ---


def test_the_votes_behind_many_on_one_answer_are_matched(buffer: Buffer) -> None:
    tell(buffer, answer("a", "yes"), answer("b", "no"), answer("c", "maybe"))
    for i in range(WINDOW + 5):
        tell(buffer, vote(f"u{i}", "a", user=f"u{i}"), vote(f"d{i}", "a", "down", user=f"d{i}"))
    assert all_of(buffer) == []
    tell(buffer, vote("x", "b", time=200.0), vote("y", "c", "down", time=201.0))
    assert sorted(pair.feedback_ids for pair in all_of(buffer)) == [("u0", "y"), ("x", "d0")]


def test_all_votes_on_one_prompt_are_learned_in_the_end(buffer: Buffer) -> None:
    count = 3 * WINDOW
    tell(buffer, answer("a", "yes"), answer("b", "no"))
    for i in range(count):
        tell(buffer, vote(f"u{i}", "a", user=f"u{i}", time=float(i)), vote(f"d{i}", "b", "down", user=f"d{i}"))
    seen: list[str] = []
    while pairs := buffer.pairs(1e9, 16):
        seen += spent(pairs)
        buffer.learned(spent(pairs), "v1")
    assert len(seen) == len(set(seen)) == 2 * count


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [1, 10**9], ids=["one prompt", "many prompts"])
def test_a_batch_costs_the_same_however_many_votes_there_are(buffer: Buffer, prompts: int) -> None:
    """Counted in steps of SQLite's machine, which no other process disturbs."""
    buffer._db.execute("PRAGMA synchronous=OFF")
    offset = 0

    def fill(count: int) -> None:
        nonlocal offset
        events: list[Event] = []
        for i in range(offset, offset + count):
            prompt = [2 + i % min(prompts, 29), 2 + i // 29 % min(prompts, 29), 2 + i // 841 % min(prompts, 29)]
            events.append(answer(f"r{i}", chr(97 + i % 5) * (1 + i % 7), prompt))
            events.append(vote(f"f{i}", f"r{i}", "up" if i % 3 else "down", user=f"u{i}", time=float(i)))
        for topic in dict.fromkeys(event.topic for event in events):
            records = [Record(e.topic, 0, i, message_of(e)) for i, e in enumerate(events) if e.topic == topic]
            buffer.consume([buffer.entry(record) for record in records], records[-1])
        offset += count

    def cost() -> int:
        steps = 0

        def step() -> int:
            nonlocal steps
            steps += 1
            return 0

        buffer._db.set_progress_handler(step, 10)
        fill(20)
        pairs = buffer.pairs(1e9, 8)
        buffer.learned(spent(pairs), "v1")
        buffer.give_back(spent(pairs))
        buffer.count_pairs(1e9)
        buffer._db.set_progress_handler(None, 0)
        return steps

    for _ in range(3):
        fill(100)
    few = cost()
    for _ in range(30):
        fill(100)
    assert cost() < 1.5 * few
