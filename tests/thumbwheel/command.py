"""The command line as a person runs it: a process of its own, with its exit code and its two outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

Done = subprocess.CompletedProcess[str]


def configure(directory: Path, log: dict[str, Any] | None = None) -> Path:
    """A settings file whose data lie beside it; `log` is as `tests.kafka.kafka` gives it."""
    lines = [f"data = {json.dumps(str(directory))}"]
    for section in ("log", "log.kafka"):
        values = (log or {}) if section == "log" else (log or {}).get("kafka", {})
        lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items() if not isinstance(value, dict)]
    file = directory / "thumbwheel.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "thumbwheel.cli", "--config", str(config), *arguments]


def run(config: Path, *arguments: str, **environment: str) -> Done:
    """Run to the end, a minute at most."""
    return subprocess.run(
        command(config, *arguments),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )
