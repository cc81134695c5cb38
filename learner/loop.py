"""The learner's loop: poll, join, update, hold to the budget, submit.

What is true after a kill: the checkpoint says which votes the working weights have learned from; the buffer is told
before anything else is read. A cycle ends with a submission or a drop, and then the checkpoint goes; the next one
starts from whoever is champion by then, with a new optimizer.
"""

import logging
import threading
import time
from pathlib import Path

import torch

from learner import candidate, kl, metrics, prompts
from learner.buffer import Buffer, Example
from learner.checkpoint import Checkpoint, Checkpoints, Cursor
from learner.intake import Intake
from learner.policy import Policy
from learner.progress import Stopped, task
from learner.trainer import Refused, Trainer
from thumbwheel.errors import AdapterError
from thumbwheel.events import BASE
from thumbwheel.log import Log
from thumbwheel.reader import RolloutFollower
from thumbwheel.settings import Settings
from thumbwheel.store import Adapter, AdapterStore, number

logger = logging.getLogger(__name__)

ROLLOUT_GROUP = "learner.rollout"


class Learner:
    """One learner a log: it assumes that no other writes its files or submits candidates."""

    def __init__(self, settings: Settings, log: Log, policy: Policy, stop: threading.Event) -> None:
        """Go on where a former run was. `stop`, once set, ends a step in the middle.

        Raises LogError where the log cannot be reached; nothing has been done then.
        """
        self._settings = settings.learner
        self._log = log
        self._stop = stop
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
        place = settings.path(Path("learner"))
        self._policy = policy
        self._prompts: list[list[int]] | None = None
        if self._settings.kl_prompts is not None:
            self._prompts = prompts.read(settings.path(self._settings.kl_prompts), settings.path(settings.engine.model))
        held_out = prompts.held_out(self._prompts)
        self._rollout = RolloutFollower(log, ROLLOUT_GROUP)
        self._rollout.poll()
        self._buffer = Buffer(place / "buffer.sqlite", policy.vocabulary, held_out, log.identity)
        self._intake = Intake(log, self._buffer)
        self._checkpoints = Checkpoints(place / "checkpoints")
        self._store = AdapterStore(settings.path(settings.store.path))
        self._random = torch.Generator().manual_seed(self._settings.seed)
        self._trainer: Trainer | None = None
        self._cursor: Cursor | None = None
        self._offered: str | None = None
        self._waits_for = ""
        metrics.kl_budget.set(self._settings.kl_budget)
        self._resume()

    def step(self) -> bool:
        """One round, an update at most; says whether there was anything to do."""
        try:
            fresh = self.poll()
            if not self._trained():
                examples = self.join()
                if not examples:
                    return fresh
                self.update(examples)
            if self._trained():
                self.submit(self.hold())
        except Stopped:
            logger.info("stopped in the middle of an update; it starts again from the last checkpoint")
            return False
        return True

    # --- the five verbs ---

    def poll(self) -> bool:
        """Take in what is new on the log."""
        fresh = bool(self._rollout.poll())
        fresh = self._intake.poll() or fresh
        metrics.open_candidates.set(len(self._rollout.state.open()))
        for state, count in self._buffer.counts().items():
            metrics.votes.labels(state).set(count)
        return fresh

    def join(self) -> list[Example]:
        """The next batch: settled votes with their answers, of both classes, as many of each as there is on the whole.

        Empty while there are too few, none of one class, or a candidate waits for a decision.
        """
        chosen = self._settings
        before = time.time() - chosen.settle_s
        ups, downs = self._buffer.count_ready(before)
        held_out = self._buffer.count_held_out() if self._prompts is None else len(self._prompts)
        for rating, count in (("up", ups), ("down", downs)):
            metrics.missing.labels(rating).set(ups + downs >= chosen.batch and count == 0)
        metrics.held_out.set(held_out)
        if waiting := self._rollout.state.open():
            return self._wait(f"{waiting[0].version} waits for a decision; votes are collected")
        if self._offered is not None and self._offered not in self._rollout.state.candidates:
            return self._wait(f"{self._offered} was submitted, and does not come back from the log yet")
        if ups + downs < chosen.batch:
            return self._wait(f"a batch takes {chosen.batch} votes that have settled")
        if not ups or not downs:
            return self._wait(f"all votes are thumbs {'down' if downs else 'up'}: one class teaches nothing")
        if held_out < prompts.AT_LEAST:
            return self._wait(f"{held_out} of {prompts.AT_LEAST} held-out prompts to measure KL on have been seen")
        self._waits_for = ""
        take = min(max(round(chosen.batch * ups / (ups + downs)), 1, chosen.batch - downs), ups, chosen.batch - 1)
        return self._buffer.ready(True, before, take) + self._buffer.ready(False, before, chosen.batch - take)

    def update(self, examples: list[Example]) -> None:
        """One optimizer step, on disk with the votes that it learned from before anything else happens."""
        trainer, cursor = self._working()
        with task(f"update {cursor.updates + 1}", len(examples), self._stop) as progress:
            result = trainer.update(examples, progress)
        if isinstance(result, Refused):
            logger.warning("%d votes set aside: the model's log-probs are not finite", len(result.feedback_ids))
            for id in result.feedback_ids:
                self._buffer.set_aside(id, "the model gives it log-probs that are not finite")
            return
        ids = [example.feedback_id for example in examples]
        ups = sum(example.up for example in examples)
        self._cursor = cursor.after(ids, ups)
        self._checkpoints.save(
            Checkpoint(self._cursor, self._policy.weights(), trainer.state(), self._random.get_state())
        )
        self._buffer.learned(ids, "in the working weights")
        metrics.record_update(result, ups, len(ids) - ups)
        seen = result.diagnostics
        logger.info(
            "update %d of %d from %s: loss %.3f, reward up %+.2f down %+.2f margin %+.2f, saturated %.0f%%, "
            "grad norm %.2f, %d up %d down, %.0f tokens/s, %.1f s",
            *(self._cursor.updates, self._settings.updates_per_candidate, cursor.parent),
            *(seen.loss, seen.reward_up, seen.reward_down, seen.margin, 100 * seen.saturated),
            *(result.grad_norm, ups, len(ids) - ups, result.tokens / result.seconds, result.seconds),
        )

    def hold(self) -> Adapter | None:
        """The working weights inside the budget, as a version in the store; None when they cannot be held to it."""
        _, cursor = self._working()
        if (written := candidate.written(self._store, cursor)) is not None:
            return written
        trained = self._policy.weights()
        limit = self._settings.kl_samples
        held_out = self._buffer.held_out_prompts(limit) if self._prompts is None else self._prompts[:limit]

        def measure(scale: float) -> kl.Estimate:
            self._policy.set_weights(trained, scale)
            total = kl.work(len(held_out), self._settings.max_tokens)
            with task(f"KL at scale {scale:.2f}", total, self._stop) as progress:
                estimate = kl.measure(
                    self._policy,
                    held_out,
                    self._settings.max_tokens,
                    self._settings.kl_confidence,
                    self._random,
                    progress,
                )
            metrics.record_kl(estimate)
            logger.info(
                "KL at scale %.2f: %.2f, at most %.2f nats a sequence (%.0f%% confidence, n = %d), budget %g",
                *(scale, estimate.mean, estimate.upper, 100 * self._settings.kl_confidence, len(held_out)),
                self._settings.kl_budget,
            )
            return estimate

        held = kl.hold(self._settings.kl_budget, measure(1.0), measure)
        if held is None:
            return None
        self._policy.set_weights(trained, held[0])
        version = self._store.next_version(max(map(number, self._rollout.state.candidates), default=0))
        return candidate.write(self._store, version, self._policy, cursor, held, self._settings)

    def submit(self, adapter: Adapter | None) -> None:
        """Offer the candidate, or drop the update where there is none; either way the cycle is over."""
        _, cursor = self._working()
        if adapter is None:
            logger.warning(
                "dropped: no scale brought KL inside the budget of %g nats; %d votes are spent",
                *(self._settings.kl_budget, len(cursor.feedback_ids)),
            )
        else:
            candidate.submit(self._log, adapter)
            self._offered = adapter.version
            logger.info(
                "submitted %s (%s), from %d up %d down", *(adapter.version, adapter.digest, cursor.ups, cursor.downs)
            )
        self._buffer.learned(cursor.feedback_ids, adapter.version if adapter else "dropped: outside of the KL budget")
        self._checkpoints.clear()
        self._cursor = self._trainer = None
        metrics.candidates.labels("submitted" if adapter else "dropped").inc()

    # --- the working weights ---

    def _trained(self) -> bool:
        return self._cursor is not None and self._cursor.updates >= self._settings.updates_per_candidate

    def _working(self) -> tuple[Trainer, Cursor]:
        """The cycle in progress, or a new one from the champion. It is thrown away where its parent was rolled back."""
        champion = self._rollout.state.champion
        if self._cursor is not None and self._cursor.parent != champion and not self._trained():
            self._abandon(f"{self._cursor.parent} is champion no more")
        if self._cursor is None or self._trainer is None:
            self._start(champion)
            self._cursor = Cursor(parent=champion)
        assert self._trainer is not None
        return self._trainer, self._cursor

    def _start(self, parent: str) -> None:
        digest = self._rollout.state.digest(parent)
        self._policy.start(None if parent == BASE else self._store.verify(parent, digest))
        self._trainer = Trainer(self._policy, self._settings)

    def _abandon(self, why: str) -> None:
        """Nobody has seen these weights: their votes may be learned again."""
        assert self._cursor is not None
        logger.warning("%d updates are thrown away: %s", self._cursor.updates, why)
        self._buffer.give_back(self._cursor.feedback_ids)
        self._checkpoints.clear()
        self._cursor = self._trainer = None

    def _resume(self) -> None:
        if self._buffer.blank:  # what earlier versions learned is learned
            for version in self._store.versions():
                self._buffer.learned(self._store.open(version).manifest.learned_from.feedback_ids, version)
        saved = self._checkpoints.load()
        if saved is None:
            return
        self._cursor = saved.cursor
        self._buffer.learned(saved.cursor.feedback_ids, "in the working weights")
        try:
            self._start(saved.cursor.parent)
            self._policy.set_weights(saved.weights)
        except AdapterError as error:
            self._abandon(str(error))
            return
        assert self._trainer is not None
        self._trainer.restore(saved.optimizer)
        self._random.set_state(saved.random)
        logger.info("goes on after update %d from %s", saved.cursor.updates, saved.cursor.parent)

    def _wait(self, why: str) -> list[Example]:
        if why != self._waits_for:
            logger.info("waiting: %s", why)
        self._waits_for = why
        return []

    def close(self) -> None:
        """Leave the log, release the files."""
        self._intake.close()
        self._buffer.close()
