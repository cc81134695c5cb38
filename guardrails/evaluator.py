"""Runs the suites against one version and says what came of it."""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from guardrails import checks, suite
from guardrails.answers import Answer, Answers, Evidence
from guardrails.cache import AnswerCache
from guardrails.sampler import Sampler
from guardrails.suite import Question, Suite
from guardrails.verdicts import overall
from thumbwheel.errors import SettingsError
from thumbwheel.events import BASE, CheckResult, EvaluationReported
from thumbwheel.settings import Settings
from thumbwheel.store import Adapter, AdapterStore

logger = logging.getLogger(__name__)

SOURCE = "guardrails"
_IDS = uuid.UUID("6d0f3a52-7a3c-5b0e-9a54-0d7c5b1f2e11")
_PROGRESS_S = 10.0


async def evaluate(
    sampler: Sampler, suites: Sequence[Suite], adapter: Adapter, cache: AnswerCache
) -> list[CheckResult]:
    """Every check of every suite, in the order of the suites. Raises SamplingError where the gateway gives no answers.

    With more than one suite a check is named `suite/check`.
    """
    results = []
    for one in suites:
        evidence = await gather(sampler, one, adapter, cache)
        found = judge(one, evidence)
        if len(suites) > 1:
            found = [check.model_copy(update={"name": f"{one.name}/{check.name}"}) for check in found]
        results += found
    return results


async def gather(sampler: Sampler, suite: Suite, adapter: Adapter, cache: AnswerCache) -> Evidence:
    """Ask the candidate and, once for all candidates, the reference; then score under each what the other needs."""
    reference = await _answers(sampler, suite, BASE, adapter.manifest.base_model, cache)
    candidate = await _answers(sampler, suite, adapter.version, adapter.digest, cache)
    under_reference, served_probes = await asyncio.gather(
        asyncio.gather(*(sampler.score(BASE, a.prompt_token_ids, a.token_ids) for a in candidate.sampled)),
        asyncio.gather(
            *(
                sampler.score(adapter.version, probe.prompt_token_ids, probe.completion_token_ids)
                for probe in adapter.manifest.probes
            )
        ),
    )
    return Evidence(
        candidate, reference, under_reference, served_probes, adapter.manifest, tuple(suite.refusal_patterns)
    )


def judge(suite: Suite, evidence: Evidence) -> list[CheckResult]:
    """The suite's checks on what was gathered."""
    return [
        check(evidence, limits, suite.confidence)
        for name, check in checks.CHECKS.items()
        if (limits := getattr(suite.checks, name)) is not None
    ]


def report(version: str, digest: str, suites: Sequence[Suite], found: Sequence[CheckResult]) -> EvaluationReported:
    """The event for the log. Its id follows from the version and the suites: evaluated twice, it is appended once."""
    name = " ".join([version, digest, *(one.digest() for one in suites)])
    return EvaluationReported(
        id=str(uuid.uuid5(_IDS, name)),
        source=SOURCE,
        version=version,
        digest=digest,
        verdict=overall(found),
        checks=list(found),
        suites=[one.name for one in suites],
    )


async def evaluate_version(settings: Settings, version: str, digest: str | None = None) -> EvaluationReported:
    """Evaluate a version of the store through the gateway with the suites of the settings.

    Raises AdapterError where the version is absent or not what `digest` says, SettingsError for a mistake in a suite or
    a missing key, SamplingError where the gateway gives no answers.
    """
    suites = [suite.load(name) for name in settings.guardrails.suites]
    adapter = AdapterStore(settings.path(settings.store.path)).verify(version, digest)
    cache = AnswerCache(settings.path(Path("guardrails.sqlite")))
    model_name = settings.gateway.model_name
    try:
        async with Sampler(
            settings.guardrails.gateway,
            model=lambda name: f"{model_name}@{name}",
            key=evaluator_key(settings),
            digests={version: adapter.digest, BASE: adapter.manifest.base_model},
            concurrency=settings.guardrails.concurrency,
        ) as sampler:
            found = await evaluate(sampler, suites, adapter, cache)
    finally:
        cache.close()
    return report(version, adapter.digest, suites, found)


def evaluator_key(settings: Settings) -> str:
    """The API key of the guardrails, from the environment or the file. Raises SettingsError where neither is there."""
    if key := os.environ.get("THUMBWHEEL_EVALUATOR_KEY", "").strip():
        return key
    path = settings.path(settings.guardrails.key_file)
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(
            f"the guardrails have no API key: set $THUMBWHEEL_EVALUATOR_KEY, or put a key with the scope evaluator "
            f"into {path} ([guardrails] key_file): {error}"
        ) from error


async def _answers(sampler: Sampler, suite: Suite, version: str, digest: str, cache: AnswerCache) -> Answers:
    """A version's answers to all sets of a suite, all sets at once, so that the engine's batch stays full."""
    if known := cache.get(suite.digest(), digest):
        return known
    questions = suite.questions()
    total = sum(len(asked) for asked in questions.values())
    logger.info("%s: asking %d questions of suite %s", version, total, suite.name)
    start = said = time.monotonic()
    done = 0

    async def ask(question: Question) -> Answer:
        nonlocal done, said
        answer = await sampler.answer(version, question)
        done, now = done + 1, time.monotonic()
        if now - said > _PROGRESS_S or done == total:
            said = now
            logger.info("%s: %d of %d answers after %.0f s", version, done, total, now - start)
        return answer

    sets = await asyncio.gather(*(asyncio.gather(*map(ask, asked)) for asked in questions.values()))
    answers = Answers(version=version, digest=digest, **dict(zip(questions, sets, strict=True)))
    cache.put(suite.digest(), answers)
    return answers
