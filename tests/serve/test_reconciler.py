"""The reconciler: only what is proved is routed, a flip drops nobody, and what was lost comes back."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.reconciler import Held, table
from serve.routing import Route, Table
from tests.adapters import append, decided, submitted, tiny_adapter
from tests.serve.engine_stub import EngineStub, stub_engine
from tests.serve.world import until, world
from thumbwheel.events import BASE, ROLLOUT, AdapterRolledBack, ReplicaReported, decode
from thumbwheel.log import SqliteLog
from thumbwheel.log.mirror import WHOLE
from thumbwheel.log.port import read_all
from thumbwheel.rollout import Rollout
from thumbwheel.store import WEIGHTS, Adapter


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.reconciler.TIDY_S", 0.02)
    monkeypatch.setattr("serve.engine.WATCH_S", 0.02)
    monkeypatch.setattr("serve.engine.FIRST_PAUSE_S", 0.02)


@pytest.fixture
def stub() -> Iterator[EngineStub]:
    with stub_engine() as running:
        yield running


async def test_a_new_gateway_serves_the_base_model(tmp_path: Path, stub: EngineStub) -> None:
    async with world(tmp_path, stub) as w:
        await until(lambda: w.serves(BASE))
        assert w.router.current() == Route(BASE, w.base_model, "policy@base")
        await until(lambda: bool(w.reports()) and w.reports()[-1].serving == BASE)


async def test_a_candidate_is_loaded_proved_and_reported_but_serves_only_once_promoted(
    tmp_path: Path, stub: EngineStub
) -> None:
    async with world(tmp_path, stub) as w:
        adapter = w.submit("v1")
        await until(lambda: w.reported("v1")[0] == "proved")
        assert w.serves(BASE)
        assert w.router.pinned("v1") == Route("v1", adapter.digest, "policy@v1")
        assert stub.loaded == {"policy@v1": adapter.path}
        w.promote(adapter)
        await until(lambda: w.serves("v1"))


async def test_a_version_in_use_is_unloaded_only_once_it_is_drained(tmp_path: Path, stub: EngineStub) -> None:
    async with world(tmp_path, stub) as w:
        first = w.submit("v1")
        w.promote(first)
        await until(lambda: w.serves("v1"))
        route = w.router.current()
        assert route is not None
        with w.router.using(route):
            for version in ("v2", "v3"):
                adapter = w.submit(version)
                w.promote(adapter)
                await until(lambda version=version: w.serves(version))  # type: ignore[misc]
            await until(lambda: w.router.pinned("v1") is None)
            await asyncio.sleep(0.1)
            assert "policy@v1" in stub.loaded
        await until(lambda: "policy@v1" not in stub.loaded)
        assert stub.unloaded == ["policy@v1"]
        assert first.path.is_dir()


async def test_a_rollback_to_the_base_model_flips_back(tmp_path: Path, stub: EngineStub) -> None:
    async with world(tmp_path, stub) as w:
        adapter = w.submit("v1")
        w.promote(adapter)
        await until(lambda: w.serves("v1"))
        back = AdapterRolledBack(
            source="test", version=BASE, digest=w.base_model, rolled_back="v1", actor="test", reason="test"
        )
        append(w.log, back)
        await until(lambda: w.serves(BASE))
        await until(lambda: not stub.loaded)


def altered(adapter: Adapter) -> None:
    weights = adapter.path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")


def truncated(adapter: Adapter) -> None:
    weights = adapter.path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])


def with_pickle(adapter: Adapter) -> None:
    (adapter.path / "adapter_model.bin").write_bytes(b"\x80")


def unmarked(adapter: Adapter) -> None:
    (adapter.path / "COMPLETE").unlink()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (altered, "fails its digest"),
        (truncated, "is truncated"),
        (with_pickle, "runs code when it is loaded"),
        (unmarked, "is not whole"),
    ],
)
async def test_a_damaged_version_is_reported_with_the_reason_and_never_reaches_the_engine(
    tmp_path: Path, stub: EngineStub, damage: Callable[[Adapter], None], why: str
) -> None:
    async with world(tmp_path, stub) as w:
        await until(lambda: w.serves(BASE))
        adapter = tiny_adapter(w.store, "v1", w.base_model)
        damage(adapter)
        append(w.log, submitted(adapter), *decided(adapter))
        await until(lambda: w.reported("v1")[0] == "failed")
        assert why in w.reported("v1")[1]
        assert w.router.pinned("v1") is None
        assert w.serves(BASE)
        assert not any(call.startswith("load") for call in stub.calls)


async def test_another_digest_than_the_submitted_one_fails(tmp_path: Path, stub: EngineStub) -> None:
    async with world(tmp_path, stub) as w:
        adapter = tiny_adapter(w.store, "v1", w.base_model)
        append(w.log, submitted(adapter).model_copy(update={"digest": "sha256:0"}))
        await until(lambda: w.reported("v1")[0] == "failed")
        assert "fails its digest" in w.reported("v1")[1]


async def test_an_adapter_of_another_base_model_fails(tmp_path: Path, stub: EngineStub) -> None:
    async with world(tmp_path, stub) as w:
        append(w.log, submitted(tiny_adapter(w.store, "v1", "sha256:other")))
        await until(lambda: w.reported("v1")[0] == "failed")
        assert "was trained on the base model sha256:other" in w.reported("v1")[1]


async def test_an_adapter_of_too_high_a_rank_fails(tmp_path: Path, stub: EngineStub) -> None:
    async with world(tmp_path, stub) as w:
        w.submit("v1", rank=32)
        await until(lambda: w.reported("v1")[0] == "failed")
        assert "rank 32" in w.reported("v1")[1]


async def test_a_version_that_the_engine_serves_wrongly_fails_is_unloaded_and_not_tried_again(
    tmp_path: Path, stub: EngineStub
) -> None:
    stub.lies.add("policy@v1")
    async with world(tmp_path, stub) as w:
        await until(lambda: w.serves(BASE))
        w.promote(w.submit("v1"))
        await until(lambda: w.reported("v1")[0] == "failed")
        assert "are not the candidate's" in w.reported("v1")[1]
        await until(lambda: not stub.loaded)
        await asyncio.sleep(0.1)
        assert stub.calls.count("load policy@v1") == 1
        assert w.serves(BASE)


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_what_the_engine_refuses_fails_with_its_reason_and_the_next_version_is_served(
    tmp_path: Path, stub: EngineStub, status: int
) -> None:
    stub.refuses["policy@v1"] = (status, "no such tensor")
    async with world(tmp_path, stub) as w:
        w.submit("v1")
        await until(lambda: w.reported("v1")[0] == "failed")
        assert "no such tensor" in w.reported("v1")[1]
        w.promote(w.submit("v2"))
        await until(lambda: w.serves("v2"))


async def test_a_dying_engine_is_no_verdict_on_the_version_that_it_was_loading(
    tmp_path: Path, stub: EngineStub
) -> None:
    async with world(tmp_path, stub) as w:
        await until(lambda: w.serves(BASE))
        stub.refuses["policy@v1"] = (500, "EngineDeadError")
        stub.healthy = False
        w.submit("v1")
        await until(lambda: w.router.current() is None)
        stub.refuses.clear()
        stub.healthy = True
        await until(lambda: w.reported("v1")[0] == "proved")
        assert not any(seen.state == "failed" for report in w.reports() for seen in report.versions)


async def test_a_champion_that_fails_at_the_start_leaves_the_gateway_not_ready_with_the_reason(
    tmp_path: Path, stub: EngineStub
) -> None:
    async with world(tmp_path, stub) as w:
        adapter = w.submit("v1")
        w.promote(adapter)
        await until(lambda: w.serves("v1"))
    truncated(adapter)
    stub.restart()
    async with world(tmp_path, stub) as w:
        await until(lambda: "is truncated" in (w.router.why_not_ready() or ""))
        assert w.router.current() is None
        assert w.router.pinned(BASE) is not None


async def test_a_new_gateway_on_a_living_engine_proves_again_what_is_loaded(tmp_path: Path, stub: EngineStub) -> None:
    async with world(tmp_path, stub) as w:
        w.promote(w.submit("v1"))
        await until(lambda: w.serves("v1"))
    assert w.router.current() is None
    before = stub.calls.count("complete policy@v1")
    async with world(tmp_path, stub) as w:
        await until(lambda: w.serves("v1"))
        assert stub.calls.count("complete policy@v1") == before + 1
    stub.lies.add("policy@v1")
    async with world(tmp_path, stub) as w:
        await until(lambda: "cannot be served here" in (w.router.why_not_ready() or ""))


async def test_an_engine_that_dies_closes_the_gateway_and_everything_is_proved_again_when_it_is_back(
    tmp_path: Path, stub: EngineStub
) -> None:
    async with world(tmp_path, stub) as w:
        w.promote(w.submit("v1"))
        await until(lambda: w.serves("v1"))
        stub.healthy = False
        await until(lambda: w.router.current() is None)
        assert "503" in (w.router.why_not_ready() or "")
        await until(lambda: w.reports()[-1].versions == [])
        stub.restart()
        stub.healthy = True
        await until(lambda: w.serves("v1"))
        assert stub.calls.count("load policy@v1") == 2


async def test_an_engine_that_was_restarted_behind_our_back_is_noticed(tmp_path: Path, stub: EngineStub) -> None:
    async with world(tmp_path, stub) as w:
        w.promote(w.submit("v1"))
        await until(lambda: w.serves("v1"))
        stub.restart()
        await until(lambda: stub.calls.count("load policy@v1") == 2)
        await until(lambda: w.serves("v1"))


async def test_what_an_earlier_gateway_left_loaded_is_unloaded(tmp_path: Path, stub: EngineStub) -> None:
    stub.loaded |= {"policy@v7": tmp_path, "somebody-elses": tmp_path}
    async with world(tmp_path, stub) as w:
        await until(lambda: w.serves(BASE))
        await until(lambda: "policy@v7" not in stub.loaded)
        assert "somebody-elses" in stub.loaded


async def test_the_report_is_repeated_as_a_sign_of_life_and_the_last_one_takes_leave(
    tmp_path: Path, stub: EngineStub
) -> None:
    async with world(tmp_path, stub, report_every_s=0.05, replica="r7") as w:
        await until(lambda: w.serves(BASE))
        count = len(w.reports())
        await until(lambda: len(w.reports()) >= count + 3)
    log = SqliteLog(w.log.path)
    last = [decode(record.message.value) for record in read_all(log, ROLLOUT)][-1]
    log.close()
    assert isinstance(last, ReplicaReported)
    assert last.leaving
    assert (last.replica, last.source) == ("r7", "gateway/r7")


async def test_nothing_is_routed_by_a_mirror_that_never_held_the_whole_rollout(
    tmp_path: Path, stub: EngineStub
) -> None:
    async with world(tmp_path, stub, backend="kafka") as w:
        adapter = w.submit("v1")
        await until(lambda: "has not been read from Kafka" in (w.router.why_not_ready() or ""))
        await asyncio.sleep(0.1)
        assert not any(call.startswith("load") for call in stub.calls)
        assert w.reports() == []
        w.promote(adapter)
        w.log.commit(WHOLE, ROLLOUT, w.log.ends(ROLLOUT)[1])
        await until(lambda: w.serves("v1"))
    async with world(tmp_path, stub, backend="kafka") as w:
        await until(lambda: w.serves("v1"))


def held(version: str, proved: bool = True, why: str = "") -> Held:
    return Held(Route(version, f"sha256:{version}", f"policy@{version}"), proved, why)


BASE_ROUTE = Route(BASE, "sha256:base", "policy@base")


def test_a_champion_that_is_not_here_yet_leaves_the_present_one_in_charge() -> None:
    v1 = held("v1")
    now = Table(v1.route, {BASE: BASE_ROUTE, "v1": v1.route}, None)
    following = table(Rollout(champion="v2"), ["v2"], {"v1": v1, "v2": held("v2", False, "bad")}, BASE_ROUTE, now)
    assert following.champion == v1.route
    assert set(following.proved) == {BASE, "v1"}


def test_without_a_present_one_the_table_says_what_is_wrong_with_the_champion() -> None:
    following = table(Rollout(champion="v2"), ["v2"], {"v2": held("v2", False, "bad")}, BASE_ROUTE, Table())
    assert following.champion is None
    assert following.why == "the champion v2 cannot be served here: bad"
    assert "being loaded" in (table(Rollout(champion="v2"), ["v2"], {}, BASE_ROUTE, Table()).why or "")


def test_what_is_held_and_not_wanted_is_not_routed() -> None:
    following = table(Rollout(), [], {"v1": held("v1")}, BASE_ROUTE, Table())
    assert following.champion == BASE_ROUTE
    assert set(following.proved) == {BASE}
