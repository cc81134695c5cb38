import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
from thumbwheel.daemon import Daemon
class Told(Daemon):
    first = True
    def step(self):
        if self.first:
            print("running", flush=True)
        self.first = False
        return False
daemon = Told(0)
daemon.run(daemon.step, 1e-6)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_whatever_it_is_in_the_middle_of(number: signal.Signals) -> None:
    """It polls so often that a signal nearly always comes while it enters or leaves its wait."""
    running = [subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "running\n"
            process.send_signal(number)
            assert process.wait(15) == 0
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_a_handler_may_set_what_its_own_thread_is_about_to_wait_on() -> None:
    code = (
        "import signal, threading; from thumbwheel.daemon import on_signal\n"
        "event = threading.Event()\n"
        "on_signal(signal.SIGUSR1, event.set)\n"
        "with event._cond:\n"  # as in the middle of event.wait
        "    signal.raise_signal(signal.SIGUSR1)\n"
        "assert event.wait(10)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
