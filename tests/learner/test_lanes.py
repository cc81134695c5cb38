"""Work side by side is the work done one after the other."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from learner.lanes import side_by_side
from learner.ranks import ALONE
from tests.learner.making import VARIANTS
from tests.learner.ranked import updated
from thumbwheel.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_lanes_run_at_the_same_time_on_a_share_of_the_threads_and_keep_the_order() -> None:
    meeting = threading.Barrier(2, timeout=10)  # nobody passes alone

    def do(item: int) -> tuple[int, int]:
        meeting.wait()
        time.sleep(0.02 if item % 2 == 0 else 0)
        return item, torch.get_num_threads()

    with side_by_side(do, range(6), 2) as results:
        assert list(results) == [(item, 1) for item in range(6)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_one_raises_comes_out_in_its_place_and_nothing_goes_on_behind_it(lanes: int) -> None:
    begun: list[int] = []
    seen: list[int] = []

    def do(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise ValueError("one")
        time.sleep(0.05)
        return item

    with pytest.raises(ValueError, match="one"), side_by_side(do, range(20), lanes) as results:
        seen += results
    count = len(begun)
    assert count < 20
    time.sleep(0.15)
    assert len(begun) == count
    assert torch.get_num_threads() == 2


def test_who_leaves_early_waits_only_for_what_has_begun() -> None:
    done: list[int] = []

    def do(item: int) -> None:
        time.sleep(0.05)
        done.append(item)

    with side_by_side(do, range(20), 2) as results:
        next(results)
    count = len(done)
    assert count < 20
    time.sleep(0.15)
    assert len(done) == count


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_lanes_give_the_update_of_one(settings: Settings, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings.model_copy(update={"learner": settings.learner.model_copy(update={"learning_rate": 1e-3})})
    for tokens in ("PART_TOKENS", "READ_TOKENS"):
        monkeypatch.setattr(f"learner.compute.{tokens}", 20)  # several parts
    found = []
    for lanes in (1, 2, 2):
        monkeypatch.setattr("learner.compute.lanes", lambda _, lanes=lanes: lanes)
        found.append(updated(settings, variant, ALONE))
    one, two, again = found
    assert one
    assert two
    assert again
    for name, weights in one.items():
        assert torch.allclose(two[name], weights, rtol=0, atol=1e-5)
        assert torch.equal(two[name], again[name])
