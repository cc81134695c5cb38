from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.upstream import Upstream, upstream
from tests.serving import Gateway, Host, gateway


@pytest.fixture(scope="session")
def stand_in() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@pytest.fixture
def engine(stand_in: Upstream) -> Upstream:
    stand_in.reset()
    return stand_in


@pytest.fixture
def served(host: Host, tmp_path: Path, engine: Upstream) -> Iterator[Gateway]:
    """A gateway in front of the stand-in, with a small limit for bodies."""
    limits: dict[str, Any] = {"gateway": {"max_body_bytes": 200_000}}
    with gateway(host, tmp_path, engine.url, **limits) as running:
        yield running


@pytest.fixture
def client(served: Gateway) -> Iterator[httpx.Client]:
    """With the key of an application: scopes inference and feedback."""
    headers = {"Authorization": f"Bearer {served.app_key}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=10) as http:
        yield http
