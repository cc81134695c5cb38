"""Child processes that never outlive their parent, not even one that was killed with SIGKILL."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

_PR_SET_PDEATHSIG = 1  # prctl(2)


def start(
    argv: Sequence[str], environment: Mapping[str, str] | None = None, output: IO[bytes] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a program in a process group of its own. It gets SIGTERM when the thread that started it ends.

    `environment` is added to ours. `output` takes its standard output and error; without it they are ours.
    """
    parent = os.getpid()

    def tie() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # the parent died in between
                os._exit(1)

    return subprocess.Popen(
        argv,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        preexec_fn=tie,
        start_new_session=True,
    )


def stop(process: "subprocess.Popen[bytes]", grace_s: float) -> None:
    """Ask the program to end, wait `grace_s` seconds, then kill it and every process of its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
