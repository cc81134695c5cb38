"""The rules of the layout: which way imports go, and what starts without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIGHT = ["thumbwheel.cli", "serve.main", "serve.app", "deploy.controller", "deploy.view", "guardrails.daemon"]


def test_imports_go_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", LIGHT)
def test_it_imports_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_serve_and_deploy_install_and_start_where_torch_is_not_installed(tmp_path: Path) -> None:
    uv = [sys.executable, "-m", "uv"]
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*uv, "venv", "--quiet", tmp_path / "venv"], check=True)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, ROOT], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    imports = "; ".join(f"import {module}" for module in LIGHT)
    code = f"import importlib.util as u; assert u.find_spec('torch') is None; {imports}"
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy() -> None:
    """`--help` has half a second; what makes it slow is an import, and that can be asserted without a clock."""
    code = (
        "import sys, thumbwheel.cli;"
        "heavy = {'pydantic', 'fastapi', 'rich', 'torch', 'aiohttp', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
