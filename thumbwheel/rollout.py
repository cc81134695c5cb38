"""The rollout as a pure fold over `policy.rollout.v1`: who is champion, what waits, what each replica holds.

    submitted → evaluated → pending_approval → approved → promoted → (previous, or rolled_back)
                    └─────────────┴────────────────┴──→ rejected

An event that does not fit the state (a promotion of what nobody approved, a digest that differs) changes nothing and
is kept in `ignored` with the reason: what a program may write to the log is not what the log makes true.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from thumbwheel.events import (
    BASE,
    AdapterPromoted,
    AdapterRolledBack,
    AnyEvent,
    CandidateApproved,
    CandidateRejected,
    CandidateSubmitted,
    EvaluationReported,
    ReplicaReported,
    RolloutEvent,
)

Status = Literal["submitted", "evaluated", "pending_approval", "approved", "promoted", "rejected", "rolled_back"]
OPEN: tuple[Status, ...] = ("submitted", "evaluated", "pending_approval", "approved")
"""The states in which a decision about a candidate is still to come."""


@dataclass(frozen=True)
class Candidate:
    """A version from its submission on, with everything that happened to it, oldest first."""

    version: str
    digest: str
    parent: str
    status: Status
    submitted: CandidateSubmitted
    report: EvaluationReported | None = None
    approval: CandidateApproved | None = None
    history: tuple[RolloutEvent, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """The state of the rollout. `champion` and `previous` are version names; `base` is the model without adapter."""

    champion: str = BASE
    previous: str | None = None
    candidates: dict[str, Candidate] = field(default_factory=dict)
    replicas: dict[str, ReplicaReported] = field(default_factory=dict)
    ignored: tuple[tuple[str, str], ...] = ()

    def open(self) -> list[Candidate]:
        """Candidates that wait for a decision, oldest first."""
        return [candidate for candidate in self.candidates.values() if candidate.status in OPEN]

    def live(self, now: float, silence: float) -> list[ReplicaReported]:
        """The replicas that spoke within `silence` seconds before `now` and did not take leave."""
        return [seen for seen in self.replicas.values() if not seen.leaving and now - seen.time <= silence]

    def wanted(self, limit: int) -> list[str]:
        """The versions that each engine should hold, most needed first, at most `limit`; the base model needs none.

        The champion, then candidates that wait (approved first, then newest), then the previous champion.
        """
        waiting = sorted(self.open(), key=lambda c: (c.status == "approved", c.submitted.time), reverse=True)
        names = [self.champion, *(candidate.version for candidate in waiting), self.previous or BASE]
        return [name for name in dict.fromkeys(names) if name != BASE][:limit]

    def digest(self, version: str) -> str | None:
        """The digest that was submitted under a version's name; None for the base model and unknown names."""
        candidate = self.candidates.get(version)
        return candidate.digest if candidate else None


def fold(events: Iterable[AnyEvent], state: Rollout | None = None) -> Rollout:
    """Apply events in the order of the log."""
    state = state or Rollout()
    for event in events:
        state = apply(state, event)
    return state


def apply(state: Rollout, event: AnyEvent) -> Rollout:
    """The state after one more event. Events of other topics change nothing."""
    if isinstance(event, ReplicaReported):
        return replace(state, replicas={**state.replicas, event.replica: event})
    if not isinstance(event, RolloutEvent):
        return state
    if isinstance(event, CandidateSubmitted):
        return _submit(state, event)
    if isinstance(event, AdapterRolledBack):
        return _roll_back(state, event)
    candidate = state.candidates.get(event.version)
    if candidate is None:
        return _ignore(state, event, f"{event.version} was never submitted")
    if event.digest != candidate.digest:
        return _ignore(state, event, f"{event.version} was submitted as {candidate.digest}, not {event.digest}")
    return _decide(state, candidate, event)


def _decide(state: Rollout, candidate: Candidate, event: RolloutEvent) -> Rollout:
    status = candidate.status
    match event:
        case EvaluationReported() if status in ("submitted", "evaluated", "pending_approval"):
            following: Status = "pending_approval" if event.verdict == "pass" else "evaluated"
            return _with(state, replace(candidate, status=following, report=event), event)
        case CandidateApproved() if status == "pending_approval" or (event.forced and status in OPEN):
            return _with(state, replace(candidate, status="approved", approval=event), event)
        case CandidateRejected() if status in OPEN:
            return _with(state, replace(candidate, status="rejected"), event)
        case AdapterPromoted() if status == "approved":
            promoted = _with(state, replace(candidate, status="promoted"), event)
            return replace(promoted, champion=candidate.version, previous=state.champion)
    return _ignore(state, event, f"{event.version} is {status}")


def _submit(state: Rollout, event: CandidateSubmitted) -> Rollout:
    if event.version in state.candidates or event.version == BASE:
        return _ignore(state, event, f"the name {event.version} is taken")
    return _with(state, Candidate(event.version, event.digest, event.parent, "submitted", event), event)


def _roll_back(state: Rollout, event: AdapterRolledBack) -> Rollout:
    target = state.candidates.get(event.version)
    if event.rolled_back != state.champion:
        return _ignore(state, event, f"the champion is {state.champion}, not {event.rolled_back}")
    if event.version == state.champion:
        return _ignore(state, event, f"{event.version} is the champion already")
    if event.version != BASE and (target is None or target.status != "promoted" or target.digest != event.digest):
        return _ignore(state, event, f"{event.version} was never champion, or is not {event.digest}")
    rolled = replace(state, champion=event.version, previous=None)
    leaving = state.candidates.get(state.champion)  # None: back from base to a champion before it
    return rolled if leaving is None else _with(rolled, replace(leaving, status="rolled_back"), event)


def _with(state: Rollout, candidate: Candidate, event: RolloutEvent) -> Rollout:
    candidate = replace(candidate, history=(*candidate.history, event))
    return replace(state, candidates={**state.candidates, candidate.version: candidate})


def _ignore(state: Rollout, event: RolloutEvent, why: str) -> Rollout:
    return replace(state, ignored=(*state.ignored, (event.id, f"{type(event).__name__}: {why}")))
