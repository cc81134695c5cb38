"""The whole loop as a newcomer runs it, from the first chat to a swap, with a fraction of the demo's traffic."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def processes_of(data: Path) -> list[str]:
    """The command lines that name a directory."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(data) in line and "demo --short" not in line:
            lines.append(line)
    return lines


def test_the_loop_turns_and_stops_and_a_greedy_candidate_is_refused(model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "demo"
    command = [sys.executable, "-m", "thumbwheel.cli", "demo", "--short", "--keep", str(data)]
    cache = model_dir.parent.parent
    done = subprocess.run([*command, "--cache", str(cache)], capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["failed_requests"] == 0
    assert outcome["kl_upper"] <= outcome["kl_budget"]
    assert outcome["swap_s"] < 60
    assert "kl_budget" in outcome["greedy_blocked_by"]
    assert outcome["greedy_kl_upper"] > outcome["kl_budget"]
    assert processes_of(data) == [], "the demo left something running"
