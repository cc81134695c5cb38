"""Events of rollouts, to build states from."""

from thumbwheel.events import (
    BASE,
    AdapterPromoted,
    AdapterRolledBack,
    AnyEvent,
    CandidateApproved,
    CandidateRejected,
    CandidateSubmitted,
    CheckResult,
    EvaluationReported,
    ReplicaReported,
    ReplicaVersion,
    Verdict,
)


def digest(version: str) -> str:
    return f"sha256:{version}"


def submitted(version: str, parent: str = BASE, time: float = 1.0) -> CandidateSubmitted:
    return CandidateSubmitted(
        id=f"{version} submitted",
        source="learner",
        version=version,
        digest=digest(version),
        parent=parent,
        algorithm="kto",
        learned_from=16,
        kl_upper=1.25,
        time=time,
    )


def reported(version: str, **verdicts: Verdict) -> EvaluationReported:
    """A report with one check a keyword; the whole is as bad as its worst check."""
    verdict: Verdict = "pass"
    for worse in ("inconclusive", "fail"):
        if worse in verdicts.values():
            verdict = worse
    return EvaluationReported(
        source="guardrails",
        version=version,
        digest=digest(version),
        verdict=verdict,
        suites=["default"],
        checks=[CheckResult(name=name, verdict=said, n=64, why=f"{name} is {said}") for name, said in verdicts.items()],
    )


def approved(version: str) -> CandidateApproved:
    return CandidateApproved(source="o", version=version, digest=digest(version), actor="ann", reason="good")


def rejected(version: str) -> CandidateRejected:
    return CandidateRejected(source="o", version=version, digest=digest(version), actor="ann", reason="bad")


def promoted(version: str, previous: str = BASE) -> AdapterPromoted:
    return AdapterPromoted(
        source="controller", version=version, digest=digest(version), previous=previous, actor="controller", time=50.0
    )


def rolled_back(version: str, target: str) -> AdapterRolledBack:
    return AdapterRolledBack(
        source="o",
        version=target,
        digest=BASE if target == BASE else digest(target),
        rolled_back=version,
        actor="ann",
        reason="worse",
    )


def champion(version: str, parent: str = BASE) -> list[AnyEvent]:
    """A whole life, up to the promotion."""
    return [submitted(version, parent), reported(version, kl="pass"), approved(version), promoted(version, parent)]


def replica(
    name: str, *proved: str, serving: str = BASE, failed: str = "", time: float = 100.0, leaving: bool = False
) -> ReplicaReported:
    versions = [ReplicaVersion(version=version, digest=digest(version), state="proved") for version in proved]
    if failed:
        why = "served log-probs are the base model's"
        versions.append(ReplicaVersion(version=failed, digest=digest(failed), state="failed", why=why))
    return ReplicaReported(
        source=f"gateway/{name}", replica=name, serving=serving, versions=versions, time=time, leaving=leaving
    )
