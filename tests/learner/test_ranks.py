"""Several processes give the update of one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from learner.ranks import ALONE, Ranks
from tests.learner.making import VARIANTS
from tests.learner.ranked import updated
from tests.learner.traffic import fill
from thumbwheel.log import SqliteLog
from thumbwheel.settings import Settings
from thumbwheel.store import AdapterStore

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_give_the_update_of_one_by_every_algorithm(settings: Settings, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"learner": settings.learner.model_copy(update={"learning_rate": 1e-3})})
    place = tmp_path / "weights.pt"
    command = [*TORCHRUN, "-m", "tests.learner.ranked", settings.model_dump_json(), str(place)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    several = torch.load(place, weights_only=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for variant in VARIANTS:
        alone = updated(settings, variant, ALONE)
        assert alone is not None
        for name, weights in alone.items():
            assert torch.allclose(several[variant][name], weights, rtol=0, atol=1e-5), (variant, name)
    torch.set_num_threads(threads)


def test_work_is_dealt_fairly_and_all_of_it() -> None:
    parts = list(range(10))
    shares = [Ranks(rank, 3).share(parts) for rank in range(3)]
    assert sorted(part for share in shares for part in share) == parts
    assert shares[0] == [0, 5, 6]
    assert ALONE.share(parts) == parts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_learner_of_two_processes_makes_a_candidate_and_stops_when_told(
    settings: Settings, tmp_path: Path, number: signal.Signals
) -> None:
    log = SqliteLog(settings.path(settings.log.path))
    fill(log, 120)
    log.close()
    store = AdapterStore(settings.path(settings.store.path))
    command = [*TORCHRUN, "-m", "tests.learner.worker", settings.model_dump_json(), ""]
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while not store.versions() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(number)
            process.wait(timeout=60)
        finally:
            process.kill()
        output.seek(0)
        said = output.read()
    assert store.versions() == ["v1"], said[-3000:]
    assert "Traceback" not in said.split("told to stop")[0], said[-3000:]
