"""The program around the loop: cheap to import, one at a time, gone within seconds of SIGTERM."""

import os
import signal
import subprocess
import sys
import time

import pytest

from learner.daemon import check
from tests.learner.traffic import fill
from tests.learner.worker import started
from thumbwheel.errors import SettingsError
from thumbwheel.log import SqliteLog
from thumbwheel.settings import LearnerSettings, Settings
from thumbwheel.store import AdapterStore


def test_importing_the_daemon_imports_nothing_heavy() -> None:
    code = "import sys, learner.daemon; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_rank_that_the_engine_does_not_serve_is_refused(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="rank is 64, but the engine serves adapters up to rank 16"):
        check(settings.model_copy(update={"learner": LearnerSettings(rank=64)}))


def test_sigterm_ends_it_and_a_second_learner_on_the_same_data_is_refused(settings: Settings) -> None:
    log = SqliteLog(settings.path(settings.log.path))
    fill(log, 120)
    log.close()
    store = AdapterStore(settings.path(settings.store.path))
    with started(settings) as process:
        while store.versions() != ["v1"]:
            assert process.poll() is None
            time.sleep(0.05)
        with started(settings) as second:
            _, errors = second.communicate(timeout=60)
            assert second.returncode != 0
            assert "another learner is running" in errors
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0, errors
        assert "update 2 of 2 from base: loss" in errors
        assert "submitted v1" in errors
