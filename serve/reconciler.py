"""Makes the engine hold, and the router route, what the log says: load, prove, flip, drain, unload.

    wanted by the rollout ──▶ verify digest ──▶ load under policy@vN ──▶ prove ──▶ routable, and reported on the log
    champion changes      ──▶ flip (one assignment), if that version is proved here
    no longer wanted      ──▶ no new requests ──▶ drained ──▶ unload the name (files are never touched)

A version that fails is reported with the reason, is never routed, and is not tried again before the engine restarts.
"""

import asyncio
import json
import logging
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram

from serve.client import EngineError, EngineRefused
from serve.engine import Engine
from serve.proof import prove
from serve.routing import Route, Router, Table
from thumbwheel.errors import AdapterError, LogError
from thumbwheel.events import BASE, ReplicaReported, ReplicaVersion
from thumbwheel.log import SqliteLog
from thumbwheel.log.group import GroupCommit
from thumbwheel.log.mirror import whole
from thumbwheel.reader import RolloutFollower
from thumbwheel.rollout import Rollout
from thumbwheel.settings import Settings
from thumbwheel.store import CONFIG, Adapter, AdapterStore, fingerprint

logger = logging.getLogger(__name__)

TIDY_S = 1.0
"""Between two looks at what the engine holds."""

loads = Counter("thumbwheel_adapter_loads", "Adapters loaded into the engine and put to the proof", ["result"])
load_seconds = Histogram(
    "thumbwheel_adapter_load_seconds",
    "Verify, load and prove one adapter",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
swaps = Counter("thumbwheel_swaps", "Times that another version became the one that answers")
last_swap = Gauge("thumbwheel_last_swap_timestamp_seconds", "When the last swap happened, Unix time")
serving = Gauge("thumbwheel_serving_version_info", "1 for the version that answers", ["version", "digest"])


@dataclass(frozen=True)
class Held:
    """What came of a version here: proved and routable, or failed, with the reason."""

    route: Route
    proved: bool
    why: str

    def reported(self) -> ReplicaVersion:
        state: Literal["proved", "failed"] = "proved" if self.proved else "failed"
        return ReplicaVersion(version=self.route.version, digest=self.route.digest, state=state, why=self.why)


def table(state: Rollout, wanted: Collection[str], held: Mapping[str, Held], base: Route, now: Table) -> Table:
    """The routes that follow from the rollout and from what is held.

    A champion that is not proved here leaves the present one in charge for as long as that is held; when there is
    none, as at the start, the table has no champion and says why.
    """
    proved = {BASE: base} | {version: seen.route for version, seen in held.items() if seen.proved}
    champion = proved.get(state.champion) or (proved.get(now.champion.version) if now.champion else None)
    routes = {v: route for v, route in proved.items() if v == BASE or v in wanted or route == champion}
    failed = held.get(state.champion)
    why = f"the champion {state.champion} is being loaded and proved"
    if failed and not failed.proved:
        why = f"the champion {state.champion} cannot be served here: {failed.why}"
    return Table(champion, routes, None if champion else why)


class Reconciler:
    """One per gateway. `run` keeps at it; `leave` says goodbye on the log."""

    def __init__(
        self,
        settings: Settings,
        log: SqliteLog,
        commit: GroupCommit,
        store: AdapterStore,
        engine: Engine,
        router: Router,
    ) -> None:
        """`log` is where the rollout is read. Raises AdapterError where the base model cannot be read: its fingerprint
        is what adapters are checked by."""
        self._settings = settings
        self._log = log
        self._known = settings.log.backend == "sqlite"
        self._follower = RolloutFollower(log)
        self._commit = commit
        self._store = store
        self._engine = engine
        self._router = router
        self._fingerprint = fingerprint(settings.path(settings.engine.model))
        self._generation = 0
        self._held: dict[str, Held] = {}
        self._loading: tuple[str, asyncio.Task[Held]] | None = None
        self._tidied = 0.0
        self._reported: tuple[float, ReplicaReported | None] = (0.0, None)
        self._serving: Route | None = None
        self._thread = ThreadPoolExecutor(1, "reconciler")  # one thread, so one connection to the log

    async def run(self) -> None:
        """Follow the log until cancelled. A log that cannot be read is waited for; what is routed stays routed."""
        try:
            while True:
                try:
                    await self.step()
                except LogError as error:
                    logger.warning("%s", error)
                    await asyncio.sleep(1.0)
                await asyncio.sleep(self._settings.gateway.poll_s)
        finally:
            if self._loading:
                self._loading[1].cancel()
            self._thread.shutdown()

    async def step(self) -> None:
        """One round: read the log, take in what was loaded, flip, start the next load, tidy up, report."""
        if not self._known and not await self._read_whole():
            return
        await asyncio.get_running_loop().run_in_executor(self._thread, self._follower.poll)
        state = self._follower.state
        wanted = state.wanted(self._settings.engine.max_loras)
        if self._engine.generation != self._generation:
            self._forget()
        if self._engine.up:
            self._collect()
            self._held = {v: seen for v, seen in self._held.items() if seen.proved or v in wanted}
            base = Route(BASE, self._fingerprint, self._engine.base_model)
            self._router.table = table(state, wanted, self._held, base, self._router.table)
            self._load_next(state, wanted)
            await self._tidy(wanted)
        self._note_swap()
        await self._report()

    async def _read_whole(self) -> bool:
        """A mirror that has never held the whole rollout does not know the champion: nothing is routed by it."""
        self._known = await asyncio.get_running_loop().run_in_executor(self._thread, whole, self._log)
        if not self._known:
            self._router.close("the rollout has not been read from Kafka yet; the forwarder's log says why")
        return self._known

    async def leave(self) -> None:
        """Say on the log that this replica is gone."""
        await self._commit.append(self._report_now().model_copy(update={"leaving": True}))

    def _forget(self) -> None:
        """The engine is a new one: nothing is loaded in it, and what failed may fare better."""
        self._generation = self._engine.generation
        self._held.clear()
        if self._loading:
            self._loading[1].cancel()
            self._loading = None

    def _collect(self) -> None:
        """Take in the load that is done. One that the engine did not answer is tried again."""
        if self._loading is None or not self._loading[1].done():
            return
        version, task = self._loading
        self._loading = None
        try:
            self._held[version] = held = task.result()
        except EngineError as error:
            logger.warning("loading %s is tried again: %s", version, error)
            return
        state = held.reported().state
        loads.labels(state).inc()
        logger.log(logging.INFO if held.proved else logging.ERROR, "%s %s: %s", version, state, held.why)

    def _load_next(self, state: Rollout, wanted: Collection[str]) -> None:
        """Start to load the most needed version that is missing, one at a time and beside this loop: no flip waits."""
        missing = next((version for version in wanted if version not in self._held), None)
        if self._loading is None and missing is not None:
            digest = state.digest(missing)
            assert digest is not None, "the rollout wants submitted versions alone"
            route = Route(missing, digest, f"{self._settings.gateway.model_name}@{missing}")
            self._loading = (missing, asyncio.create_task(self._load(route)))

    async def _load(self, route: Route) -> Held:
        """Verify, load and prove. Raises EngineError where the engine is down: then nobody knows."""
        client = self._engine.client
        try:
            with load_seconds.time():
                adapter = await asyncio.to_thread(self._store.verify, route.version, route.digest)
                self._check(adapter)
                await client.load(route.engine_model, adapter.path)
                probes = adapter.manifest.probes
                served = await asyncio.gather(
                    *(client.score(route.engine_model, p.prompt_token_ids, p.completion_token_ids) for p in probes)
                )
        except EngineRefused as error:
            await client.health()  # raises where the engine itself is dying, which says nothing about the version
            return Held(route, False, str(error))
        except (AdapterError, OSError) as error:
            return Held(route, False, str(error))
        proof = prove(probes, served)
        return Held(route, proof.proved, proof.why)

    def _check(self, adapter: Adapter) -> None:
        """Raise AdapterError unless the adapter fits this engine."""
        if adapter.manifest.base_model != self._fingerprint:
            raise AdapterError(
                f"adapter version {adapter.version} was trained on the base model {adapter.manifest.base_model}; "
                f"this engine serves {self._fingerprint}"
            )
        rank = json.loads((adapter.path / CONFIG).read_bytes())["r"]
        if rank > self._settings.engine.max_lora_rank:
            raise AdapterError(
                f"adapter version {adapter.version} has rank {rank}; the engine takes up to "
                f"{self._settings.engine.max_lora_rank} ([engine] max_lora_rank)"
            )

    async def _tidy(self, wanted: Collection[str]) -> None:
        """Unload every name of ours that nobody wants and nobody uses, whoever loaded it; notice what is missing."""
        if time.monotonic() - self._tidied < TIDY_S or self._loading:
            return
        self._tidied = time.monotonic()
        prefix = f"{self._settings.gateway.model_name}@"
        try:
            names = [model.id for model in await self._engine.client.models() if model.parent]
            listed = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            routes = self._router.table.proved
            for version in listed - set(routes):
                if not self._router.in_flight(version):
                    await self._engine.client.unload(prefix + version)
                    logger.info("%s is unloaded", version)
        except EngineError as error:
            logger.warning("the engine does not say what it holds: %s", error)  # whether it lives is the engine's watch
            return
        self._held = {v: seen for v, seen in self._held.items() if not seen.proved or v in routes}
        lost = set(routes) - listed - {BASE}
        if lost:
            self._router.close(f"the engine lost {', '.join(sorted(lost))}: it was restarted by somebody else")
            self._forget()

    def _note_swap(self) -> None:
        """Keep the metrics of what answers."""
        route = self._router.current()
        if route == self._serving:
            return
        if self._serving:
            serving.remove(self._serving.version, self._serving.digest)
        if route:
            serving.labels(route.version, route.digest).set(1)
            logger.info("%s answers now (%s)", route.version, route.digest)
            if self._serving:
                swaps.inc()
                last_swap.set_to_current_time()
        self._serving = route

    async def _report(self) -> None:
        """Report what changed at once, and the same again as a sign of life."""
        at, last = self._reported
        now = self._report_now()
        changed = last is None or (last.serving, last.versions) != (now.serving, now.versions)
        if changed or now.time - at >= self._settings.gateway.report_every_s:
            await self._commit.append(now)
            self._reported = (now.time, now)

    def _report_now(self) -> ReplicaReported:
        route = self._router.current()
        replica = self._settings.gateway.replica
        return ReplicaReported(
            source=f"gateway/{replica}",
            replica=replica,
            serving=route.version if route else "",
            versions=[self._held[version].reported() for version in sorted(self._held)] if self._engine.up else [],
        )
