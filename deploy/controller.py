"""The rollout controller: follows the log, applies the approval policy and promotes what every live replica proved.

    step: read what is new → decide (pure) → append

It keeps no state of its own. A decision's id is made from what it decides on, so a controller that was killed after an
append, or a second one beside it, appends the same id again, and the log or its readers drop it.
"""

import logging
import time
import uuid

from prometheus_client import REGISTRY

from deploy.decisions import approve, checks_with, reject
from deploy.metrics import RolloutCollector
from thumbwheel.daemon import Daemon, configure_logging
from thumbwheel.events import (
    ROLLOUT,
    AdapterPromoted,
    CandidateApproved,
    CandidateRejected,
    ReplicaReported,
    RolloutEvent,
)
from thumbwheel.log import Log, message_of, open_log
from thumbwheel.reader import RolloutFollower
from thumbwheel.rollout import Candidate, Rollout, apply
from thumbwheel.settings import DeploySettings, Settings

logger = logging.getLogger(__name__)

CONTROLLER = "controller"
POLICY = "policy:auto"
"""Who decides where nobody has to: the actor that stands in the event."""

Decision = CandidateApproved | CandidateRejected | AdapterPromoted

_DECISIONS = uuid.UUID("5e1c3f5e-4c0b-5c6b-9a60-6f2f0d6e2d11")
"""The namespace of the decisions' ids (RFC 9562, section 5.5): any fixed one will do."""


def decide(state: Rollout, settings: DeploySettings, now: float) -> list[Decision]:
    """What is to be appended now, in order: at most one decision a candidate; none where nothing is to be done.

    Newest candidate first, so that of two that are ready the newer is promoted and the older one superseded.
    """
    decided = []
    for candidate in reversed(state.open()):
        event = _next(state, candidate, settings, now)
        if event is not None:
            event = event.model_copy(update={"id": _id(candidate, event), "time": now})
            state = apply(state, event)
            decided.append(event)
    return decided


def _next(state: Rollout, candidate: Candidate, settings: DeploySettings, now: float) -> Decision | None:
    """The next step of one candidate, if it can take one by itself."""
    live = state.live(now, settings.replica_silence_s)
    if why := _unfit(state, candidate, live):
        return reject(state, candidate.version, actor=CONTROLLER, reason=why, source=CONTROLLER)
    if candidate.status == "approved":
        return _promote(state, candidate) if _proved(candidate, live) else None
    return _by_policy(state, candidate) if settings.approval == "auto" else None


def _by_policy(state: Rollout, candidate: Candidate) -> Decision | None:
    """Approval "auto": what passed goes on, what failed ends, what is inconclusive waits for a person."""
    report = candidate.report
    if report is None or report.verdict == "inconclusive":
        return None
    if report.verdict == "fail":
        reason = f"failed checks: {checks_with(report, 'fail') or 'not named'}"
        return reject(state, candidate.version, actor=POLICY, reason=reason, source=CONTROLLER)
    suites = f" of {', '.join(report.suites)}" if report.suites else ""
    reason = f"all {len(report.checks)} checks{suites} passed"
    return approve(state, candidate.version, actor=POLICY, reason=reason, source=CONTROLLER)


def _unfit(state: Rollout, candidate: Candidate, live: list[ReplicaReported]) -> str | None:
    """Why a candidate must not go live whatever its gates say, under either approval policy. None: it may."""
    for replica in live:
        for held in replica.versions:
            if held.version == candidate.version and held.state == "failed":
                return f"replica {replica.replica} could not prove it: {held.why or 'no reason given'}"
    order = list(state.candidates)  # in the order of submission
    if state.champion in order and order.index(candidate.version) < order.index(state.champion):
        return f"superseded: {state.champion}, submitted after it, is the champion"
    if (bad := _rolled_back_ancestor(state, candidate)) is not None:
        return f"it descends from {bad}, which was rolled back"
    return None


def _rolled_back_ancestor(state: Rollout, candidate: Candidate) -> str | None:
    """What was taken back from users must not come back to them inside its offspring."""
    seen = {candidate.version}
    ancestor = state.candidates.get(candidate.parent)
    while ancestor is not None and ancestor.version not in seen:
        if ancestor.status == "rolled_back":
            return ancestor.version
        seen.add(ancestor.version)
        ancestor = state.candidates.get(ancestor.parent)
    return None


def _proved(candidate: Candidate, live: list[ReplicaReported]) -> bool:
    """Whether there is a live replica, and every one holds these very weights and has proved them."""
    return bool(live) and all(
        any(
            held.version == candidate.version and held.digest == candidate.digest and held.state == "proved"
            for held in replica.versions
        )
        for replica in live
    )


def _promote(state: Rollout, candidate: Candidate) -> AdapterPromoted:
    return AdapterPromoted(
        source=CONTROLLER,
        version=candidate.version,
        digest=candidate.digest,
        previous=state.champion,
        actor=CONTROLLER,
    )


def _id(candidate: Candidate, event: RolloutEvent) -> str:
    """The same for every controller that sees the candidate in this state, and new once that state has changed.

    The last event of the candidate's history stands for the state: a decision that came too late for one report does
    not keep the same decision about the next report off the log.
    """
    basis = candidate.history[-1].id
    return str(uuid.uuid5(_DECISIONS, f"{candidate.version} {candidate.digest} {type(event).__name__} {basis}"))


class Controller:
    """`decide` on a log."""

    def __init__(self, log: Log, settings: DeploySettings) -> None:
        self._log = log
        self._settings = settings
        self._follower = RolloutFollower(log, CONTROLLER)
        self._appended: set[str] = set()

    @property
    def state(self) -> Rollout:
        return self._follower.state

    def step(self) -> bool:
        """Read, decide, append. Whether anything was appended, so that more may follow from it.

        A decision is appended once: it may take a moment until it is read.
        """
        self._follower.poll()
        decisions = decide(self.state, self._settings, time.time())
        decided = [event for event in decisions if event.id not in self._appended]
        if not decided:
            return False
        appended = self._log.append(ROLLOUT, [message_of(event) for event in decided])
        self._appended.update(event.id for event in decided)
        fresh = [event for event, where in zip(decided, appended, strict=True) if not where.duplicate]
        for event in fresh:
            logger.info("%s: %s", event.version, _words(event))
        return bool(fresh)


def _words(event: Decision) -> str:
    match event:
        case CandidateApproved():
            return f"approved by {event.actor}: {event.reason}"
        case CandidateRejected():
            return f"rejected by {event.actor}: {event.reason}"
        case AdapterPromoted():
            return f"promoted; the champion before was {event.previous}"


def run(settings: Settings) -> None:
    """Control the rollout until SIGTERM or SIGINT."""
    configure_logging("control")
    log = open_log(settings)
    kafka = settings.log.backend == "kafka"
    place = f"Kafka at {settings.log.kafka.bootstrap}" if kafka else settings.path(settings.log.path)
    controller = Controller(log, settings.deploy)
    REGISTRY.register(RolloutCollector(lambda: controller.state, settings.deploy.replica_silence_s))
    logger.info("approval is %s; the log is %s", settings.deploy.approval, place)
    try:
        Daemon(settings.deploy.metrics_port).run(controller.step, settings.deploy.poll_s)
    finally:
        log.close()
