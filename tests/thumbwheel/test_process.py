import subprocess
import sys
import time
from pathlib import Path

import pytest

from thumbwheel import process

pytestmark = pytest.mark.slow

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    for _ in range(200):
        if not alive(pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_a_child_does_not_outlive_a_parent_that_was_killed() -> None:
    start = f"print(process.start({SLEEPER!r}).pid, flush=True)"
    code = f"from thumbwheel import process; import time; {start}; time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until_gone(child)


def test_stop_ends_one_that_ignores_sigterm_and_what_it_started() -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); time.sleep(60)"
    )
    with open("/dev/null", "wb") as null:
        running = process.start([sys.executable, "-c", "import time; time.sleep(60)"], output=null)
        process.stop(running, 5)
        assert running.returncode == -15
    reader = subprocess.Popen([sys.executable, "-c", _started_and_stopped(code)], stdout=subprocess.PIPE, text=True)
    output, _ = reader.communicate(timeout=60)
    wait_until_gone(int(output.split()[0]))


def _started_and_stopped(code: str) -> str:
    return (
        "import sys, tempfile, time; from thumbwheel import process\n"
        "with tempfile.NamedTemporaryFile() as out:\n"
        f"    running = process.start([sys.executable, '-c', {code!r}], output=out)\n"
        "    while not (said := open(out.name).read()): time.sleep(0.05)\n"
        "    process.stop(running, 0.3)\n"
        "    assert running.returncode == -9, running.returncode\n"
        "    print(said)\n"
    )
