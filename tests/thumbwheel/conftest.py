"""Either log, for what has to work on both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import kafka
from tests.thumbwheel.command import configure
from thumbwheel.log import Log, open_log
from thumbwheel.log.kafka.topics import make
from thumbwheel.settings import load


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Settings of a log whose topics are made."""
    if request.param == "sqlite":
        return configure(tmp_path)
    values = kafka.kafka(request.getfixturevalue("kafka_address"))
    file = configure(tmp_path, values)
    make(load(file))
    return file


@pytest.fixture
def log(config: Path) -> Iterator[Log]:
    made = open_log(load(config))
    yield made
    made.close()
