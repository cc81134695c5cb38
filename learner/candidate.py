"""A candidate: the adapter with its manifest in the store, and its submission on the log.

Both steps may be repeated. A version is known by the votes that it learned from, so a second try finds what the first
one wrote; the event's id follows from the digest, so a second submission is the same event, and the log drops it.
"""

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from learner.checkpoint import Cursor
from learner.kl import Estimate, Measured
from thumbwheel.events import CandidateSubmitted
from thumbwheel.log import Log, message_of
from thumbwheel.manifest import KLBound, LearnedFrom, Manifest, Probe
from thumbwheel.settings import LearnerSettings
from thumbwheel.store import Adapter, AdapterStore

if TYPE_CHECKING:
    from learner.policy import Policy

PROBES = 8
PROBE_TOKENS = 48
"""Of one answer: its first ones."""
ENOUGH_TOKENS = 128
"""Of all probes. A policy that answers in three words needs more probes: a gateway takes no proof from a few tokens."""
_IDS = uuid.UUID("5f0b9d0e-8c1d-5d52-9a3c-6f6a0f0f3c11")


def probes(answers: Sequence[Measured]) -> list[Probe]:
    """The answers whose first tokens tell candidate from base best: the proof is the mean over all of their tokens."""

    def apart(answer: Measured) -> float:
        pairs = list(zip(answer.candidate, answer.reference, strict=True))[:PROBE_TOKENS]
        return sum(abs(ours - theirs) for ours, theirs in pairs) / len(pairs)

    chosen: list[Probe] = []
    tokens = 0
    for answer in sorted(answers, key=apart, reverse=True):
        if len(chosen) >= PROBES and tokens >= ENOUGH_TOKENS:
            break
        probe = Probe(
            prompt_token_ids=answer.row.prompt,
            completion_token_ids=answer.row.completion[:PROBE_TOKENS],
            candidate_logprobs=answer.candidate[:PROBE_TOKENS],
            base_logprobs=answer.reference[:PROBE_TOKENS],
        )
        chosen.append(probe)
        tokens += len(probe.completion_token_ids)
    return chosen


def write(
    store: AdapterStore,
    version: str,
    policy: "Policy",
    cursor: Cursor,
    held: tuple[float, Estimate],
    settings: LearnerSettings,
) -> Adapter:
    """Put the policy, as it is, into the store under `version`. `held` is its scale and its measured KL."""
    scale, estimate = held
    manifest = Manifest(
        version=version,
        parent=cursor.parent,
        base_model=policy.base_fingerprint,
        created=time.time(),
        algorithm=settings.algorithm,
        learned_from=LearnedFrom(
            ups=cursor.ups, downs=cursor.downs, pairs=cursor.pairs, feedback_ids=list(cursor.feedback_ids)
        ),
        reward_model=cursor.reward,
        kl=KLBound(
            mean=estimate.mean,
            upper=estimate.upper,
            per_token=estimate.per_token,
            n=len(estimate.answers),
            budget=settings.kl_budget,
            scale=scale,
        ),
        probes=probes(estimate.answers),
        settings=settings.model_dump(mode="json"),
    )
    return store.write(version, manifest, policy.save)


def written(store: AdapterStore, cursor: Cursor) -> Adapter | None:
    """The version that was written from just these votes before a kill, if there is one."""
    for version in reversed(store.versions()):
        adapter = store.open(version)
        if tuple(adapter.manifest.learned_from.feedback_ids) == cursor.feedback_ids:
            return adapter
    return None


def submit(log: Log, adapter: Adapter) -> CandidateSubmitted:
    """Offer a version that is whole in the store. Raises LogError; then, and at any time, it may be called again."""
    learned_from = adapter.manifest.learned_from
    event = CandidateSubmitted(
        id=str(uuid.uuid5(_IDS, f"{adapter.version} {adapter.digest}")),
        source="learner",
        version=adapter.version,
        digest=adapter.digest,
        parent=adapter.manifest.parent,
        algorithm=adapter.manifest.algorithm,
        learned_from=len(learned_from.feedback_ids),
        kl_upper=adapter.manifest.kl.upper,
    )
    log.append(event.topic, [message_of(event)])
    return event
