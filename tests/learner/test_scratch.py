"""Rooms are a thread's own, and what an operation gives never lies in one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from learner import attention, fused
from learner.scratch import room


def test_a_room_is_used_again_and_grows() -> None:
    small = room(0, (2, 3), torch.float32)
    assert small.shape == (2, 3)
    assert small.dtype == torch.float32
    large = room(0, (1000, 1000), torch.float64)
    assert large.shape == (1000, 1000)
    assert room(0, (7,), torch.bfloat16).data_ptr() == large.data_ptr()
    assert room(1, (7,), torch.bfloat16).data_ptr() != large.data_ptr()


def test_each_thread_has_its_own() -> None:
    mine = room(0, (5,), torch.float32).fill_(1)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: room(0, (5,), torch.float32).fill_(2)).result()
    assert mine.tolist() == [1] * 5
    assert other.tolist() == [2] * 5


def test_a_room_made_in_inference_mode_serves_outside_of_it() -> None:
    def write() -> list[float]:
        with torch.inference_mode():
            room(0, (4,), torch.float32).fill_(1)
        return room(0, (4,), torch.float32).fill_(2).tolist()

    with ThreadPoolExecutor(1) as pool:  # where there are no rooms yet
        assert pool.submit(write).result() == [2] * 4


def attend(x: Tensor) -> Tensor:
    by_token = x.view(1, 12, 4, 4).transpose(1, 2)
    mixed, _ = attention.attention(
        None, by_token, by_token[:, :2], by_token[:, 2:], None, spans=attention.spans([[4, 3], [5]], x.dtype)
    )
    return mixed


def norm(x: Tensor) -> Tensor:
    return fused._Norm.apply(x, torch.linspace(1, 2, 16).to(x.dtype), 1e-5)  # type: ignore[no-untyped-call, no-any-return]


def gated(x: Tensor) -> Tensor:
    return fused._Gated.apply(x, x + 1)  # type: ignore[no-untyped-call, no-any-return]


@pytest.mark.parametrize("operation", [attend, norm, gated])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_an_operation_gave_is_not_changed_by_the_next(
    operation: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    def run(seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
        made = operation(x)
        return made.detach(), torch.autograd.grad(made.square().sum(), x)[0]

    found = run(0)
    before = [each.clone() for each in found]
    other = run(1)
    assert not torch.equal(found[0], other[0])
    for each, old in zip(found, before, strict=True):
        assert torch.equal(each, old)
