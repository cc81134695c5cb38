import pytest

from learner.algorithm import Needs
from learner.supply import Supply

THUMBS, PAIRS = Needs(), Needs(pairs=True)


def test_nothing_is_lacking_where_a_batch_is_there() -> None:
    assert Supply(ups=1, downs=15, pairs=0, held_out=8).lacks(THUMBS, 16) == []
    assert Supply(ups=0, downs=0, pairs=16, held_out=8).lacks(PAIRS, 16) == []


@pytest.mark.parametrize(
    ("supply", "needs", "words"),
    [
        (Supply(8, 8, 16, 7), THUMBS, ["7 of 8 held-out prompts"]),
        (Supply(8, 7, 16, 8), THUMBS, ["15 of 16 votes"]),
        (Supply(0, 0, 0, 8), THUMBS, ["0 of 16 votes"]),
        (Supply(16, 0, 0, 8), THUMBS, ["all votes are thumbs up: one class"]),
        (Supply(0, 3, 0, 0), THUMBS, ["0 of 8 held-out", "3 of 16 votes", "all votes are thumbs down"]),
        (Supply(99, 99, 3, 8), PAIRS, ["3 of 16 pairs: corrections"]),
        (Supply(0, 0, 0, 0), PAIRS, ["0 of 8 held-out", "0 of 16 pairs"]),
    ],
)
def test_each_thing_that_is_missing_is_named(supply: Supply, needs: Needs, words: list[str]) -> None:
    lacks = supply.lacks(needs, 16)
    assert len(lacks) == len(words)
    for lack, word in zip(lacks, words, strict=True):
        assert word in lack
