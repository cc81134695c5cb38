"""What an operator, or a policy in an operator's name, may decide about a rollout.

Pure functions: each takes the state and returns the event that says the decision, to be appended to the log, or raises
RolloutError with what stands in the way. The fold has the last word: between reading the state and appending,
somebody else may have decided. `confirm` tells whether a decision took effect.
"""

from thumbwheel.errors import RolloutError
from thumbwheel.events import (
    BASE,
    AdapterRolledBack,
    CandidateApproved,
    CandidateRejected,
    EvaluationReported,
    Event,
    Verdict,
)
from thumbwheel.rollout import OPEN, Candidate, Rollout


def approve(
    state: Rollout,
    version: str,
    *,
    actor: str,
    reason: str,
    digest: str | None = None,
    force: bool = False,
    source: str = "operator",
) -> CandidateApproved:
    """Let a candidate go live once every live replica has proved it.

    `digest`, where given, has to be the one that was submitted. `force` skips gates that are missing, failed or
    inconclusive; the event says so, but only where there was something to skip.
    """
    candidate = _open(state, version, digest)
    _signed("approve", actor, reason)
    if candidate.status == "approved" and candidate.approval is not None:
        raise RolloutError(
            f"{version} is approved already, by {candidate.approval.actor}: it is promoted once every live replica "
            "has proved it"
        )
    passed = candidate.status == "pending_approval"
    if not passed and not force:
        raise RolloutError(f"{version} {_in_the_way(candidate.report)}")
    return CandidateApproved(
        source=source,
        version=version,
        digest=candidate.digest,
        actor=actor.strip(),
        reason=reason.strip(),
        forced=not passed,
    )


def reject(
    state: Rollout, version: str, *, actor: str, reason: str, digest: str | None = None, source: str = "operator"
) -> CandidateRejected:
    """Say that a candidate will not go live. It cannot be undone: names are never reused."""
    candidate = _open(state, version, digest)
    _signed("reject", actor, reason)
    return CandidateRejected(
        source=source, version=version, digest=candidate.digest, actor=actor.strip(), reason=reason.strip()
    )


def roll_back(
    state: Rollout,
    version: str | None = None,
    *,
    actor: str,
    reason: str,
    digest: str | None = None,
    source: str = "operator",
) -> AdapterRolledBack:
    """Put an earlier champion, or the base model, back in the champion's place: `version`, else the one before.

    `digest`, where given, has to be the target's. Each gateway flips once its engine holds the target.
    """
    _signed("roll back", actor, reason)
    targets = earlier_champions(state)
    target = version or state.previous
    if target is None:
        raise RolloutError(
            f"nothing is known to come before the champion {state.champion}: name the version to go back to "
            f"({', '.join(targets) or 'there is none'})"
        )
    if target == state.champion:
        raise RolloutError(f"{target} is the champion already")
    if target not in targets:
        known = state.candidates.get(target)
        why = f"it is {known.status}" if known else "no such version was ever submitted"
        raise RolloutError(
            f"cannot roll back to {target}: {why}. Only a former champion or the base model can come back: "
            f"{', '.join(targets) or 'there is none'}"
        )
    theirs = state.digest(target) or BASE
    _same(target, theirs, digest)
    return AdapterRolledBack(
        source=source,
        version=target,
        digest=theirs,
        rolled_back=state.champion,
        actor=actor.strip(),
        reason=reason.strip(),
    )


def earlier_champions(state: Rollout) -> list[str]:
    """What a rollback can go to, newest first, the base model last. What was itself rolled back is not among it."""
    promoted = [name for name, candidate in state.candidates.items() if candidate.status == "promoted"]
    return [name for name in (*reversed(promoted), BASE) if name != state.champion]


def confirm(state: Rollout, event: Event) -> None:
    """Raise RolloutError where the log made nothing of a decision. `state` has to be read after the append."""
    for id, why in state.ignored:
        if id == event.id:
            raise RolloutError(f"the decision came too late and changed nothing: {why}")


def checks_with(report: EvaluationReported, verdict: Verdict) -> str:
    """The checks of a report with this verdict, with what they say: "kl (0.9 over 0.5), refusals"."""
    found = [check for check in report.checks if check.verdict == verdict]
    return ", ".join(f"{check.name} ({check.why})" if check.why else check.name for check in found)


def _open(state: Rollout, version: str, digest: str | None) -> Candidate:
    """The candidate, if a decision about it can still be taken."""
    if version == BASE:
        raise RolloutError("base is the model without adapter, not a candidate; roll back to it instead")
    candidate = state.candidates.get(version)
    if candidate is None:
        waiting = ", ".join(candidate.version for candidate in state.open()) or "none"
        raise RolloutError(f"no version {version} was ever submitted; these wait for a decision: {waiting}")
    _same(version, candidate.digest, digest)
    if candidate.status not in OPEN:
        raise RolloutError(f"{version} is decided already: it is {candidate.status}")
    return candidate


def _same(version: str, theirs: str, given: str | None) -> None:
    if given is not None and given != theirs:
        raise RolloutError(
            f"{version} has the digest {theirs}, not {given}: look at it again before you decide "
            f"(thumbwheel adapters show {version})"
        )


def _signed(verb: str, actor: str, reason: str) -> None:
    """Every decision is on the log for good: who and why are part of it."""
    if not actor.strip() or not reason.strip():
        raise RolloutError(f"to {verb} takes a name and a reason: both stay on the log")


def _in_the_way(report: EvaluationReported | None) -> str:
    """Why a candidate cannot be approved as it is, in words."""
    if report is None:
        return "is not evaluated yet: wait for the guardrails, or skip the gates with force and a reason"
    found = [
        f"{word}: {names}"
        for word, names in (
            ("failed", checks_with(report, "fail")),
            ("inconclusive", checks_with(report, "inconclusive")),
        )
        if names
    ]
    return (
        f"did not pass its gates ({'; '.join(found) or report.verdict}): reject it, or skip the gates with force and "
        "a reason"
    )
