"""Clusters of our own, for tests that kill the broker or that need locks on its doors."""

from collections.abc import Iterator

import pytest

from tests.kafka import needs_release
from tests.thumbwheel.log.kafka.secured import Secured
from thumbwheel.demo.broker import Cluster


@pytest.fixture(scope="session")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One broker that may be killed; whoever does so starts it again."""
    needs_release()
    with Cluster(tmp_path_factory.mktemp("mortal")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """One broker with a listener for users with passwords, one for clients with certificates, and access rights."""
    needs_release()
    with Secured(tmp_path_factory.mktemp("secured")) as cluster:
        yield cluster
