"""The processes that share an update: one leads, the others do as it does. Started by `torchrun`, or one alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")

PATIENCE = timedelta(days=3650)
"""How long a follower waits for something to do: votes may be rare."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size`; rank 0 leads."""

    rank: int = 0
    size: int = 1

    def share(self, parts: Sequence[T]) -> list[T]:
        """This rank's part of the work, to and fro, so that parts that get smaller are fairly dealt."""
        turn = [i % (2 * self.size) for i in range(len(parts))]
        mine = (self.rank, 2 * self.size - 1 - self.rank)
        return [part for part, at in zip(parts, turn, strict=True) if at in mine]

    def tell(self, what: object) -> None:
        """The leader's word to the others."""
        if self.size > 1:
            distributed.broadcast_object_list([what], src=0, device=torch.device("cpu"))

    def hear(self) -> object:
        """What the leader says; a follower waits for it."""
        box: list[object] = [None]
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over the ranks: one message for all that are of one kind."""
        if self.size == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor)
        for some in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            distributed.all_reduce(flat)
            for tensor, total in zip(some, torch.split(flat, [tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(total.view_as(tensor))


ALONE = Ranks()


def join() -> Ranks:
    """Meet the other processes that `torchrun` started; alone where it did not start this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def device(chosen: str) -> str:
    """The device of this process: of "cuda", the GPU that `torchrun` gave it."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if chosen == "cuda" and "LOCAL_RANK" in os.environ else chosen
