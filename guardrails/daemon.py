"""The guardrails' daemon: follows the rollout, and reports on each candidate that has no report yet."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from guardrails import metrics, suite
from guardrails.evaluator import evaluate_version, evaluator_key, report
from guardrails.report import summary
from guardrails.sampler import SamplingError
from thumbwheel.daemon import Daemon, configure_logging
from thumbwheel.errors import AdapterError
from thumbwheel.events import CheckResult, EvaluationReported, ReplicaVersion
from thumbwheel.log import Log, message_of, open_log
from thumbwheel.reader import RolloutFollower
from thumbwheel.rollout import Candidate
from thumbwheel.settings import Settings

logger = logging.getLogger(__name__)

GROUP = "guardrails"
Evaluate = Callable[[Settings, str, str], Awaitable[EvaluationReported]]
_RETRY_S = 5.0


def run(settings: Settings) -> None:
    """Evaluate candidates until SIGTERM or SIGINT; an evaluation in progress is dropped then, and done again later.

    Raises SettingsError at once where a suite has mistakes or there is no API key.
    """
    configure_logging("guardrails")
    for name in settings.guardrails.suites:
        suite.load(name)
    evaluator_key(settings)
    daemon = Daemon(settings.guardrails.metrics_port)
    log = open_log(settings)
    try:
        guardrails = Guardrails(settings, log, daemon.should_exit.is_set)
        logger.info("suites %s; gateway %s", ", ".join(settings.guardrails.suites), settings.guardrails.gateway)
        daemon.run(guardrails.step, settings.guardrails.poll_s)
    finally:
        log.close()


def evaluate_once(settings: Settings, version: str) -> EvaluationReported:
    """Evaluate one version now, as the daemon would, and return the report; nothing is appended to the log.

    Raises AdapterError, SettingsError and SamplingError as `evaluator.evaluate_version` does.
    """
    return asyncio.run(evaluate_version(settings, version))


class Guardrails:
    """One step: catch up with the log, evaluate the oldest candidate that can be, append the report."""

    def __init__(
        self, settings: Settings, log: Log, should_exit: Callable[[], bool], evaluate: Evaluate = evaluate_version
    ) -> None:
        self._settings = settings
        self._log = log
        self._should_exit = should_exit
        self._evaluate = evaluate
        self._follower = RolloutFollower(log, GROUP)
        self._reported: set[tuple[str, str]] = set()
        self._not_before = 0.0

    def step(self) -> bool:
        """Whether a report was made. A gateway that gives no answers is asked again after 5 s."""
        self._follower.poll()
        if time.monotonic() < self._not_before:
            return False
        for candidate in self._follower.state.open():
            if candidate.report is not None or (candidate.version, candidate.digest) in self._reported:
                continue  # what was appended may take a moment to be read
            if (seen := self._replicas(candidate)) and self._report_on(candidate, seen):
                return True
        return False

    def _replicas(self, candidate: Candidate) -> list[ReplicaVersion]:
        """What the live replicas say of a candidate, once one of them proved it or all of them failed; else nothing."""
        live = self._follower.state.live(time.time(), self._settings.deploy.replica_silence_s)
        said = [
            version
            for replica in live
            for version in replica.versions
            if (version.version, version.digest) == (candidate.version, candidate.digest)
        ]
        proved = [version for version in said if version.state == "proved"]
        return proved or (said if len(said) == len(live) else [])

    def _report_on(self, candidate: Candidate, seen: list[ReplicaVersion]) -> bool:
        start = time.monotonic()
        try:
            found = self._failed(candidate, seen) if seen[0].state == "failed" else self._evaluated(candidate)
        except SamplingError as error:
            logger.warning("%s has no result yet; trying again in %.0f s: %s", candidate.version, _RETRY_S, error)
            self._not_before = time.monotonic() + _RETRY_S
            return False
        if found is None:
            return False
        (appended,) = self._log.append(found.topic, [message_of(found)])
        self._reported.add((candidate.version, candidate.digest))
        self._follower.poll()
        if not appended.duplicate:
            metrics.observe(found, time.monotonic() - start)
        logger.info("%s, after %.1f s", summary(found), time.monotonic() - start)
        return True

    def _evaluated(self, candidate: Candidate) -> EvaluationReported | None:
        """The report, or None when the program has to stop. A version that fails its digest fails the evaluation."""
        try:
            return asyncio.run(self._until_stopped(self._evaluate(self._settings, candidate.version, candidate.digest)))
        except AdapterError as error:
            return self._refuse(candidate, str(error))

    async def _until_stopped(self, evaluation: Awaitable[EvaluationReported]) -> EvaluationReported | None:
        task = asyncio.ensure_future(evaluation)
        while not self._should_exit():
            if (await asyncio.wait([task], timeout=0.2))[0]:
                return task.result()
        task.cancel()
        await asyncio.wait([task])
        return None

    def _failed(self, candidate: Candidate, seen: list[ReplicaVersion]) -> EvaluationReported:
        return self._refuse(
            candidate, "; ".join(dict.fromkeys(f"no replica can serve it: {each.why}" for each in seen))
        )

    def _refuse(self, candidate: Candidate, why: str) -> EvaluationReported:
        suites = [suite.load(name) for name in self._settings.guardrails.suites]
        check = CheckResult(name="served_equals_trained", verdict="fail", n=0, why=why)
        return report(candidate.version, candidate.digest, suites, [check])
