"""What a batch spends, and what is left of it."""

from learner.examples import Pair, Thumb, spent, without

THUMBS = [Thumb(id, [2], [3], True, [-1.0]) for id in ("f1", "f2")]
PAIRS = [Pair(("f1", "f2"), [2], [3], [4], "votes"), Pair(("f3",), [2], [3], [4], "correction")]


def test_a_pair_spends_all_its_votes_and_a_thumb_its_own() -> None:
    assert spent(PAIRS) == ["f1", "f2", "f3"]
    assert spent(THUMBS) == ["f1", "f2"]


def test_what_is_left_out_goes_by_its_place() -> None:
    assert without(PAIRS, {0}) == PAIRS[1:]
    assert without(THUMBS, ()) == THUMBS
