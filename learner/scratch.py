"""A thread's own memory for what does not outlive an operation, used again by the next.

On a CPU memory from malloc is cold, often not even there yet, and searching for it takes time; what the operation
before has just used is in the cache. Whoever takes a room has it until the same thread takes the same one again.
"""

import threading
from math import prod

import torch
from torch import Tensor


class _Rooms(threading.local):
    def __init__(self) -> None:
        self.bytes: dict[int, Tensor] = {}


_rooms = _Rooms()


def room(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU that is not initialized."""
    size = prod(shape) * dtype.itemsize
    flat = _rooms.bytes.get(number)
    if flat is None or len(flat) < size:
        flat = _rooms.bytes[number] = torch.empty(size, dtype=torch.uint8)
    return flat[:size].view(dtype).view(shape)
