"""Votes meet responses in any order."""

from hypothesis import given
from hypothesis import strategies as st

from learner.join import Ballot, Vote, join, match

votes_strategy = st.lists(
    st.builds(
        Vote,
        feedback_id=st.sampled_from([f"f{i}" for i in range(12)]),
        response_id=st.sampled_from(["a", "b"]),
        choice_index=st.integers(0, 1),
        user=st.sampled_from(["u", "v"]),
        up=st.sampled_from([True, False, None]),
        time=st.sampled_from([1.0, 2.0, 3.0]),
        learned=st.booleans(),
    ),
    unique_by=lambda vote: vote.feedback_id,
)
ANSWERS = {("a", 0): None, ("a", 1): "bad", ("b", 0): None}


@given(votes_strategy, st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_nothing(votes: list[Vote], random: object) -> None:
    shuffled = list(votes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert join(votes, ANSWERS, {"a", "b"}) == join(shuffled + shuffled, ANSWERS, {"a", "b"})


@given(votes_strategy)
def test_at_most_one_vote_of_a_user_on_an_answer_counts(votes: list[Vote]) -> None:
    standings = join(votes, ANSWERS, {"a", "b"})
    assert standings.keys() == {vote.feedback_id for vote in votes}
    ready = [v for v in votes if standings[v.feedback_id].state == "ready"]
    places = [(v.response_id, v.choice_index, v.user) for v in ready]
    assert len(places) == len(set(places))
    for v in votes:
        mine = [w for w in votes if (w.response_id, w.choice_index, w.user) == (v.response_id, v.choice_index, v.user)]
        last = max(mine, key=lambda w: (w.time, w.feedback_id))
        admitted = ANSWERS.get((v.response_id, v.choice_index), "no such choice") is None
        counts = v is last and v.up is not None and admitted and not any(w.learned for w in mine)
        assert (standings[v.feedback_id].state == "ready") == counts
        assert (standings[v.feedback_id].state == "learned") == v.learned


def test_a_vote_before_its_response_waits() -> None:
    early = Vote("f", "a", 0, "u", True, 1.0)
    assert join([early], {}, set())["f"].state == "waiting"
    assert join([early], {("a", 0): None}, {"a"})["f"].state == "ready"


def test_a_retraction_takes_the_vote_back() -> None:
    standings = join([Vote("f", "a", 0, "u", True, 1.0), Vote("g", "a", 0, "u", None, 2.0)], {("a", 0): None}, {"a"})
    assert {standing.state for standing in standings.values()} == {"set_aside"}
    assert standings["g"].reason == "a retraction"


def test_several_users_each_have_a_vote() -> None:
    votes = [Vote("f", "a", 0, "u", True, 1.0), Vote("g", "a", 0, "v", False, 1.0)]
    assert [s.state for s in join(votes, {("a", 0): None}, {"a"}).values()] == ["ready", "ready"]


def test_a_vote_on_a_choice_that_is_not_there_says_so() -> None:
    standing = join([Vote("f", "a", 7, "u", True, 1.0)], {("a", 0): None}, {"a"})["f"]
    assert (standing.state, standing.reason) == ("set_aside", "the response has no choice 7")


def ballots(*cast: tuple[bool, str]) -> list[Ballot]:
    """On one prompt, in the order of time, each with its answer."""
    return [Ballot(str(i), up, float(i), b"p", answer.encode()) for i, (up, answer) in enumerate(cast)]


def ids(ballots: list[Ballot]) -> list[tuple[str, str]]:
    return [(up.feedback_id, down.feedback_id) for up, down in match(ballots)]


def test_the_oldest_is_matched_with_the_oldest() -> None:
    assert ids(ballots((True, "a"), (False, "b"), (True, "c"), (True, "d"), (False, "e"))) == [("0", "1"), ("2", "4")]


def test_no_answer_is_better_than_itself() -> None:
    assert ids(ballots((True, "a"), (False, "a"), (True, "a"))) == []
    assert ids(ballots((True, "a"), (False, "a"), (False, "b"), (True, "b"))) == [("0", "2"), ("3", "1")]


def test_votes_on_different_prompts_are_not_matched() -> None:
    up, down = ballots((True, "a"), (False, "b"))
    assert ids([up, Ballot("1", False, 1.0, b"q", b"b")]) == []
    assert ids([up, down]) == [("0", "1")]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=14), st.integers(0, 14))
def test_what_comes_later_changes_no_match_and_nothing_that_could_be_matched_is_left(
    cast: list[tuple[bool, str]], cut: int
) -> None:
    whole, beginning = ids(ballots(*cast)), ids(ballots(*cast[:cut]))
    assert whole[: len(beginning)] == beginning
    used = [id for pair in whole for id in pair]
    assert len(used) == len(set(used))
    for up, down in whole:
        assert cast[int(up)][0]
        assert not cast[int(down)][0]
        assert cast[int(up)][1] != cast[int(down)][1]
    rest = [cast[i] for i in range(len(cast)) if str(i) not in used]
    assert not any(a[0] != b[0] and a[1] != b[1] for a in rest for b in rest)
