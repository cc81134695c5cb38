"""The whole loop on one machine: gateway with its engine, learner, guardrails, controller, one process each."""

import logging
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from thumbwheel import process
from thumbwheel.daemon import on_signal

logger = logging.getLogger(__name__)

PROGRAMS = {"gateway": "serve", "learner": "learn", "guardrails": "evaluate", "controller": "control"}
"""Each program and the command that starts it, in the order of their start."""

_CALM_S = 60.0
"""A program that ran this long is started again at once; one that keeps falling over waits longer each time."""


@dataclass
class _Program:
    name: str
    argv: list[str]
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    failures: int = 0
    due: float = field(default=0.0)


class Supervisor:
    """Keeps programs running until SIGTERM or SIGINT, then ends them, the gateway last.

    SIGHUP starts all but the gateway again, with the settings as they are now: chats and thumbs go on meanwhile.
    """

    def __init__(self, config: Path | None, programs: dict[str, str] = PROGRAMS, grace_s: float = 60.0) -> None:
        command = [sys.executable, "-m", "thumbwheel.cli", *(["--config", str(config)] if config else [])]
        self._programs = [_Program(name, [*command, verb]) for name, verb in programs.items()]
        self._grace_s = grace_s
        self._should_exit = threading.Event()
        self._should_renew = threading.Event()

    def run(self) -> None:
        """Block until told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            on_signal(number, self._should_exit.set)
        on_signal(signal.SIGHUP, self._should_renew.set)
        try:
            while not self._should_exit.is_set():
                if self._should_renew.is_set():
                    self._should_renew.clear()
                    self._renew()
                for program in self._programs:
                    self._tend(program, time.monotonic())
                self._should_exit.wait(0.2)
        finally:
            for program in reversed(self._programs):
                if program.process is not None:
                    process.stop(program.process, self._grace_s)

    def _renew(self) -> None:
        for program in self._programs[1:]:
            if program.process is not None:
                process.stop(program.process, self._grace_s)
                program.process, program.due = None, 0.0

    def _tend(self, program: _Program, now: float) -> None:
        if program.process is not None and (code := program.process.poll()) is not None:
            process.stop(program.process, 0.0)  # what it may have left behind
            program.process = None
            program.failures = 1 if now - program.started > _CALM_S else program.failures + 1
            wait = min(30.0, 0.5 * 2 ** (program.failures - 1))
            program.due = now + wait
            logger.error("%s ended with %d; starting it again in %.1f s", program.name, code, wait)
        if program.process is None and now >= program.due:
            program.process = process.start(program.argv)
            program.started = now
            logger.info("%s started, pid %d", program.name, program.process.pid)
