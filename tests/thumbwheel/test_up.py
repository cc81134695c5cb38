"""The supervisor of `thumbwheel up`, with two real controllers as its programs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.thumbwheel.test_process import wait_until_gone

pytestmark = pytest.mark.slow

CODE = """
import sys
from pathlib import Path
from thumbwheel.daemon import configure_logging
from thumbwheel.up import Supervisor
configure_logging("up")
Supervisor(Path(sys.argv[1]), {"gateway": "control", "controller": "control"}, grace_s=10).run()
"""


class Up:
    def __init__(self, directory: Path) -> None:
        config = directory / "thumbwheel.toml"
        config.write_text(f'data = "{directory}"\n[deploy]\nmetrics_port = 0\n')
        self.output = directory / "up.log"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen([sys.executable, "-c", CODE, str(config)], stderr=output)

    def pids(self, name: str) -> list[int]:
        return [int(pid) for pid in re.findall(rf"{name} started, pid (\d+)", self.output.read_text())]

    def started(self, name: str, times: int) -> int:
        """The pid of a program once it was started that often and follows the log."""
        for _ in range(300):
            following = self.output.read_text().count("approval is manual")
            if len(self.pids(name)) >= times and following >= len(self.pids("gateway")) + len(self.pids("controller")):
                return self.pids(name)[-1]
            time.sleep(0.05)
        raise AssertionError(self.output.read_text())


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    running = Up(tmp_path)
    yield running
    running.process.kill()
    running.process.wait()


def test_a_program_that_was_killed_is_started_again(up: Up) -> None:
    first = up.started("controller", 1)
    gateway = up.started("gateway", 1)
    os.kill(first, signal.SIGKILL)
    assert up.started("controller", 2) != first
    assert up.pids("gateway") == [gateway]


def test_sighup_renews_all_but_the_gateway(up: Up) -> None:
    first = up.started("controller", 1)
    gateway = up.started("gateway", 1)
    up.process.send_signal(signal.SIGHUP)
    assert up.started("controller", 2) != first
    wait_until_gone(first)
    assert up.pids("gateway") == [gateway]


def test_sigterm_ends_every_program(up: Up) -> None:
    pids = [up.started(name, 1) for name in ("gateway", "controller")]
    up.process.terminate()
    assert up.process.wait(20) == 0
    for pid in pids:
        wait_until_gone(pid)
