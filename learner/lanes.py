"""Work side by side on the cores of one machine.

Two threads of one core each, which each have a half to do, are faster than two that do each operation together: small
operations gain nothing from a second core, and each operation ends with a wait for the slower of the two.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def side_by_side(do: Callable[[Item], Result], items: Sequence[Item], lanes: int) -> Iterator[Iterator[Result]]:
    """The results of `do`, in the order of `items`, in `lanes` threads that share torch's between them.

    What one raises comes out in its place. Nothing runs any more when the context is left, however it is left. Modes
    of torch that belong to a thread, such as whether gradients are kept, are for `do` to set.
    """
    if lanes == 1:
        yield map(do, items)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(lanes, "lane", torch.set_num_threads, (threads // lanes,))
    try:
        begun = deque(pool.submit(do, item) for item in items)
        yield (begun.popleft().result() for _ in items)  # what was taken is kept no longer
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a thread's own number, but in part everybody's
