"""The rollout as Prometheus metrics, computed from the folded state when they are asked for."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from thumbwheel.events import BASE, AdapterPromoted, AdapterRolledBack
from thumbwheel.rollout import Rollout, Status


class RolloutCollector(Collector):
    """Reads the state at each scrape: the state is immutable, so that the scraping thread needs no lock."""

    def __init__(self, state: Callable[[], Rollout], silence_s: float) -> None:
        self._state = state
        self._silence_s = silence_s

    def collect(self) -> Iterator[Metric]:
        return families(self._state(), time.time(), self._silence_s)


def families(state: Rollout, now: float, silence_s: float) -> Iterator[Metric]:
    """The metrics of one state. A replica is live when it spoke within `silence_s` seconds before `now`."""
    champion = GaugeMetricFamily(
        "thumbwheel_rollout_champion_info", "1 for the version that is champion", labels=["version", "digest"]
    )
    champion.add_metric([state.champion, state.digest(state.champion) or BASE], 1)
    yield champion

    candidates = GaugeMetricFamily(
        "thumbwheel_rollout_candidates", "Adapter versions, by where they are in the rollout", labels=["status"]
    )
    counts = Counter(candidate.status for candidate in state.candidates.values())
    for status in get_args(Status):
        candidates.add_metric([status], counts[status])
    yield candidates

    live = state.live(now, silence_s)
    yield GaugeMetricFamily("thumbwheel_rollout_live_replicas", "Replicas that gave a sign of life", value=len(live))
    yield GaugeMetricFamily(
        "thumbwheel_rollout_champion_replicas",
        "Live replicas that serve the champion",
        value=sum(replica.serving == state.champion for replica in live),
    )
    for name, kind, what in (
        ("promotion", AdapterPromoted, "promotion"),
        ("rollback", AdapterRolledBack, "rollback from an adapter"),
    ):
        times = [
            event.time
            for candidate in state.candidates.values()
            for event in candidate.history
            if isinstance(event, kind)
        ]
        yield GaugeMetricFamily(
            f"thumbwheel_rollout_last_{name}_timestamp_seconds",
            f"Unix time of the last {what}; 0 when there was none",
            value=max(times, default=0.0),
        )
    yield GaugeMetricFamily(
        "thumbwheel_rollout_ignored_events", "Events on the log that did not fit the state", value=len(state.ignored)
    )
