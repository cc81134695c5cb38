"""Which version answers: the table that the reconciler writes and that every request reads.

The table is immutable and replaced by one assignment, so a request sees the state before a flip or the state after it
and nothing between. A request holds its route from start to end (`using`), and a version is unloaded only once nobody
holds it. All of it runs on one event loop and needs no lock.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Route:
    """A version that may serve: its digest, and the name under which the engine holds it."""

    version: str
    digest: str
    engine_model: str


@dataclass(frozen=True)
class Table:
    """What may serve now. `proved` by version name; `champion` is one of them, or None with the reason in `why`."""

    champion: Route | None = None
    proved: Mapping[str, Route] = field(default_factory=dict)
    why: str | None = "the gateway is starting"


class Router:
    """The table in force, and how many requests each version is answering."""

    def __init__(self) -> None:
        self.table = Table()
        self._in_flight: Counter[str] = Counter()

    def current(self) -> Route | None:
        """The champion's route; None while the gateway is not ready."""
        return self.table.champion

    def pinned(self, version: str) -> Route | None:
        """The route of a version that is loaded and proved (`base` among them); None of any other."""
        return self.table.proved.get(version)

    def why_not_ready(self) -> str | None:
        """None when the champion serves, else the reason why nothing does."""
        return None if self.table.champion else self.table.why

    def close(self, why: str) -> None:
        """Route nothing from here on, because of `why`."""
        self.table = Table(why=why)

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Hold a route while a request is answered on it."""
        self._in_flight[route.version] += 1
        try:
            yield
        finally:
            self._in_flight[route.version] -= 1

    def in_flight(self, version: str) -> int:
        """How many requests hold a version."""
        return self._in_flight[version]
