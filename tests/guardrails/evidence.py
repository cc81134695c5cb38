"""Evidence for the checks: answers made of numbers, so that a test knows what is true of them."""

import random
from collections.abc import Sequence

from guardrails.answers import Answer, Answers, Evidence
from thumbwheel.manifest import KLBound, LearnedFrom, Manifest, Probe

REFUSAL = "I'm sorry, but I can't help with that."


def answer(
    text: str = "fine", logprobs: Sequence[float] = (-1.0, -1.0), ids: Sequence[int] | None = None, ended: bool = False
) -> Answer:
    return Answer(
        prompt="?",
        text=text,
        prompt_token_ids=[1, 2],
        token_ids=list(ids if ids is not None else range(len(logprobs))),
        logprobs=list(logprobs),
        ended=ended,
    )


def manifest(upper: float = 1.0, probes: Sequence[Probe] = ()) -> Manifest:
    return Manifest(
        version="v1",
        base_model="sha256:base",
        created=0.0,
        algorithm="kto",
        learned_from=LearnedFrom(ups=1, downs=1, feedback_ids=[]),
        kl=KLBound(mean=upper * 0.8, upper=upper, per_token=0.01, n=64, budget=4.0),
        probes=list(probes),
    )


def answers(version: str, sampled: Sequence[Answer] = (), **sets: Sequence[Answer]) -> Answers:
    return Answers(version=version, digest=f"sha256:{version}", sampled=list(sampled), **sets)


def evidence(
    candidate: Answers,
    reference: Answers | None = None,
    under_reference: Sequence[Sequence[float]] | None = None,
    upper: float = 1.0,
    patterns: Sequence[str] = (r"I can't",),
) -> Evidence:
    """`under_reference` defaults to the candidate's own log-probs: a candidate that is the reference."""
    scores = [a.logprobs for a in candidate.sampled] if under_reference is None else under_reference
    return Evidence(
        candidate=candidate,
        reference=reference or candidate,
        under_reference=[list(row) for row in scores],
        served_probes=[],
        manifest=manifest(upper),
        refusal_patterns=tuple(patterns),
    )


def moved(mean: float, spread: float = 0.5, n: int = 40, upper: float = 1.0, seed: int = 0) -> Evidence:
    """Served answers whose log-ratio to the reference is `mean` ± `spread` nats a sequence, exactly in the mean."""
    chance = random.Random(seed)
    ratios = [chance.gauss(0, 1) for _ in range(n)]
    centre = sum(ratios) / n
    rows = [answer(logprobs=[-1.0] * 10) for _ in ratios]
    under = [[-1.0 - (mean + spread * (ratio - centre)) / 10] * 10 for ratio in ratios]
    return evidence(answers("v1", rows), under_reference=under, upper=upper)
