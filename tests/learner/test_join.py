"""Votes meet responses in any order."""

from hypothesis import given
from hypothesis import strategies as st

from learner.join import Vote, join

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
