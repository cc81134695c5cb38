import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from deploy.metrics import RolloutCollector, families
from tests.deploy.lives import approved, champion, digest, replica, reported, rolled_back, submitted
from thumbwheel.events import BASE, AnyEvent
from thumbwheel.rollout import Rollout, fold


def samples(events: list[AnyEvent], now: float = 110.0) -> dict[tuple[str, ...], float]:
    """The samples by name and label values."""
    return {
        (sample.name.removeprefix("thumbwheel_rollout_"), *sample.labels.values()): sample.value
        for family in families(fold(events), now, 60.0)
        for sample in family.samples
    }


def test_the_metrics_say_who_is_champion_what_waits_and_who_lives() -> None:
    seen = samples(
        [
            *champion("v1"),
            submitted("v2", "v1"),
            reported("v2", kl="pass"),
            submitted("v3", "v1"),
            approved("v3"),
            replica("r1", "v1", serving="v1"),
            replica("r2", serving=BASE),
            replica("r3", serving="v1", time=10.0),
        ]
    )
    assert seen["champion_info", "v1", digest("v1")] == 1
    assert seen["candidates", "pending_approval"] == 1
    assert seen["candidates", "submitted"] == 1
    assert seen["candidates", "rejected"] == 0
    assert seen["live_replicas",] == 2
    assert seen["champion_replicas",] == 1
    assert seen["last_promotion_timestamp_seconds",] == 50.0
    assert seen["last_rollback_timestamp_seconds",] == 0.0
    assert seen["ignored_events",] == 1


def test_only_the_champion_of_now_is_exported() -> None:
    seen = samples([*champion("v1"), *champion("v2", "v1"), rolled_back("v2", BASE)])
    assert [key for key in seen if key[0] == "champion_info"] == [("champion_info", BASE, BASE)]
    assert seen["last_rollback_timestamp_seconds",] > 0


def test_a_scrape_shows_the_state_as_it_is_then() -> None:
    states = [Rollout(), fold(champion("v1"))]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RolloutCollector(lambda: states[-1], 60.0))
    assert b'champion_info{digest="sha256:v1",version="v1"} 1.0' in generate_latest(registry)
    states.append(Rollout())
    assert b'champion_info{digest="base",version="base"} 1.0' in generate_latest(registry)


def test_the_documentation_names_every_metric_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    assert set(re.findall(r"thumbwheel_rollout_\w+", text)) == {
        family.name for family in families(Rollout(), 0.0, 60.0)
    }
