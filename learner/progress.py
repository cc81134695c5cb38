"""Progress that a person sees: a bar where there is a terminal, nothing where log lines do the telling."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Stopped(Exception):
    """The program was told to stop in the middle of long work; what is on disk is as the last checkpoint left it."""


@contextmanager
def task(what: str, total: int, stop: threading.Event) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with each part of the work that is done; it raises Stopped once `stop` is set."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        id = bar.add_task(what, total=total)

        def advance(done: int) -> None:
            if stop.is_set():
                raise Stopped
            bar.advance(id, done)

        yield advance
