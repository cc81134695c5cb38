"""How the rows of an update are cut into what goes through the model together."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.batch import Plan, even_parts, of_one_prompt, parts
from learner.logprobs import Row

lengths = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 100)), min_size=1, max_size=20)


def plan(lengths: Sequence[tuple[int, int]]) -> Plan:
    """Rows of prompts and answers of these lengths, each prompt of a token of its own."""
    rows = [Row([i] * prompt, [0] * answer) for i, (prompt, answer) in enumerate(lengths)]
    return Plan(rows, list(range(len(rows))), units=of_one_prompt(rows))


def sizes(plan: Plan, cut: Sequence[Sequence[int]]) -> list[int]:
    return [sum(len(plan.rows[i]) for i in part) for part in cut]


@pytest.mark.parametrize("way", [parts, even_parts])
@given(lengths=lengths, tokens=st.integers(1, 500), among=st.integers(1, 4))
def test_each_row_is_in_one_part_and_units_stay_whole(
    way: Callable[[Plan, int, int], list[list[int]]], lengths: list[tuple[int, int]], tokens: int, among: int
) -> None:
    rows = [row for row in plan(lengths).rows for _ in range(2)]
    made = Plan(rows, list(range(len(rows))), units=[[2 * i, 2 * i + 1] for i in range(len(lengths))])
    cut = way(made, tokens, among)
    assert sorted(i for part in cut for i in part) == list(range(len(rows)))
    for part in cut:
        assert part
        for first, second in zip(part[::2], part[1::2], strict=True):
            assert (first % 2, second) == (0, first + 1)


@given(lengths, st.integers(1, 500), st.integers(1, 4))
def test_even_parts_differ_by_no_more_than_a_row(lengths: list[tuple[int, int]], tokens: int, among: int) -> None:
    """Longest first to where there is least: the last row of a part was put where less lay than anywhere else."""
    made = plan(lengths)
    found = sizes(made, even_parts(made, tokens, among))
    assert max(found) - min(found) <= max(map(len, made.rows))
    assert found == sorted(found, reverse=True)


@given(lengths, st.integers(1, 500), st.integers(1, 4))
def test_there_are_as_many_even_parts_as_keep_all_who_share_them_busy(
    lengths: list[tuple[int, int]], tokens: int, among: int
) -> None:
    made = plan(lengths)
    count = len(even_parts(made, tokens, among))
    assert count == len(lengths) or count % among == 0
    total = sum(map(len, made.rows))
    assert count == len(lengths) or count * tokens >= total
    assert (count - among) * tokens < total  # and no more than that


def test_rows_of_many_lengths_are_shared_evenly_by_two() -> None:
    """Sixteen rows from 50 to 800 tokens, shared by two, 640 tokens at a time."""
    made = plan([(50 * (i + 1) - 20, 20) for i in range(16)])
    found = sizes(made, even_parts(made, 640, 2))
    assert len(found) == 12
    assert sum(found[0::2]) / sum(found[1::2]) == pytest.approx(1, abs=0.1)
