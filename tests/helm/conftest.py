import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helm.kube import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real control plane with two nodes of two GPUs each; THUMBWHEEL_TEST_KUBE names the folder of its program."""
    folder = os.environ.get("THUMBWHEEL_TEST_KUBE")
    if not folder:
        why = "THUMBWHEEL_TEST_KUBE does not name the folder of a Kubernetes control plane"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    command = [sys.executable, str(Path(folder) / "cluster"), str(tmp_path_factory.mktemp("kube")), "--gpus", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            word, _, kubeconfig = process.stdout.readline().strip().partition(" ")
            assert word == "ready", "the control plane did not start: see its words above"
            yield Cluster(Path(kubeconfig))
        finally:
            process.terminate()
