"""A real learner in a process of its own, with settings as JSON. It can be told to hang where a test kills it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from thumbwheel.settings import Settings

POINTS = {
    "mid read": ("learner.buffer.Buffer._join", 1),
    "mid update": ("learner.trainer.Trainer._step", 2),
    "updated, not saved": ("learner.loop.Checkpoints.save", 1),
    "saved, not told to the buffer": ("learner.loop.Buffer.learned", 2),  # the first is at the start
    "mid measure": ("learner.kl._compare", 1),
    "measured, not written": ("learner.candidate.write", 1),
    "written, not submitted": ("learner.candidate.submit", 1),
    "submitted, not cleared": ("learner.loop.Checkpoints.clear", 1),
}
"""Where a learner can be told to hang: before it calls the function of this name for the n-th time.

In this order, each started where the one before was killed, they lie in one cycle of two updates.
"""


@contextmanager
def started(settings: Settings, point: str = "") -> Iterator[subprocess.Popen[str]]:
    """A running learner, killed at the end if it still runs. It hangs, and prints so, at a point of `POINTS`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.learner.worker", settings.model_dump_json(), point]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _hang(name: str, call: int) -> None:
    import importlib
    import threading
    from itertools import count

    parts = name.split(".")
    owner = importlib.import_module(".".join(parts[:2]))
    for part in parts[2:-1]:
        owner = getattr(owner, part)
    plain, calls = getattr(owner, parts[-1]), count(1)

    def hang(*arguments: object, **named: object) -> object:
        if next(calls) == call:
            print("hangs", flush=True)
            threading.Event().wait()
        return plain(*arguments, **named)

    setattr(owner, parts[-1], hang)


if __name__ == "__main__":
    from learner.daemon import run

    if sys.argv[2]:
        _hang(*POINTS[sys.argv[2]])
    run(Settings.model_validate_json(sys.argv[1]))
