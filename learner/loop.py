"""The learner's loop: poll, join, update, hold to the budget, submit.

What is true after a kill: the checkpoint says which votes the working weights have learned from; the buffer is told
before anything else is read. A cycle ends with a submission or a drop, and then the checkpoint goes; the next one
starts from whoever is champion by then, with a new optimizer.
"""

import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from learner import algorithms, candidate, fresh, kl, metrics, prompts, reward_model
from learner.buffer import Buffer
from learner.checkpoint import Checkpoint, Checkpoints, Cursor
from learner.compute import Compute
from learner.examples import Examples, Pair, Thumb, spent, without
from learner.intake import Intake
from learner.models import LearnerModels
from learner.policy import Policy
from learner.progress import Stopped, task
from learner.ranks import ALONE, Ranks
from learner.supply import Supply
from learner.tokens import Tokens
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

    def __init__(
        self, settings: Settings, log: Log, policy: Policy, stop: threading.Event, ranks: Ranks = ALONE
    ) -> None:
        """Go on where a former run was. `stop`, once set, ends a step in the middle; `ranks` share the updates.

        Raises LogError where the log cannot be reached; nothing has been done then. Raises SettingsError.
        """
        self._settings = settings.learner
        self._log = log
        self._stop = stop
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
        place = settings.path(Path("learner"))
        self._policy = policy
        self._algorithm = algorithms.make(self._settings, policy.width)
        self._prompts: list[list[int]] | None = None
        if self._settings.kl_prompts is not None:
            self._prompts = prompts.read(settings.path(self._settings.kl_prompts), settings.path(settings.engine.model))
        held_out = prompts.held_out(self._prompts)
        self._rollout = RolloutFollower(log, ROLLOUT_GROUP)
        self._rollout.poll()
        tokens = Tokens.load(settings.path(settings.engine.model))
        self._buffer = Buffer(place / "buffer.sqlite", policy.vocabulary, held_out, log.identity, tokens)
        self._intake = Intake(log, self._buffer)
        self._checkpoints = Checkpoints(place / "checkpoints")
        self._store = AdapterStore(settings.path(settings.store.path))
        self._rewards = place / "rewards"
        self._random = torch.Generator().manual_seed(self._settings.seed)
        self._compute = Compute(policy, self._algorithm, ranks)
        self._source: fresh.Source | None = None
        if self._algorithm.needs.fresh:
            url = self._settings.fresh.engine
            self._source = fresh.Engine(url, policy, place / "fresh") if url else fresh.Memory(policy, self._random)
        self._models = LearnerModels(
            policy, self._compute, self._settings, self._held_out, self._random, stop, self._source
        )
        self._fit_at = 0
        self._reward_version = ""
        self._trainer: Trainer | None = None
        self._cursor: Cursor | None = None
        self._offered: str | None = None
        self._waits_for = ""
        metrics.kl_budget.set(self._settings.kl_budget)
        self._resume()

    def step(self) -> bool:
        """One round, an update at most; says whether there was anything to do."""
        try:
            new = self.poll()
            if not self._trained():
                examples = self.join()
                if not examples:
                    return new
                self.update(examples)
            if self._trained():
                self.submit(self.hold())
        except Stopped:
            logger.info("stopped in the middle of an update; it starts again from the last checkpoint")
            return False
        except fresh.FreshError as error:
            self._wait(f"no fresh answers: {error}")
            return False
        return True

    # --- the five verbs ---

    def poll(self) -> bool:
        """Take in what is new on the log."""
        new = bool(self._rollout.poll())
        new = self._intake.poll() or new
        metrics.open_candidates.set(len(self._rollout.state.open()))
        for state, count in self._buffer.counts().items():
            metrics.votes.labels(state).set(count)
        return new

    def join(self) -> Examples:
        """The next batch: pairs, or settled votes with their answers, of each class as many as there is on the whole.

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
        needs, supply = self._algorithm.needs, Supply(ups, downs, self._buffer.count_pairs(before), held_out)
        if missing := supply.lacks(needs, chosen.batch):
            return self._wait(missing[0])
        if needs.fresh and not self._reward_model(before, ups + downs):
            return []
        self._waits_for = ""
        return supply.batch(self._buffer, needs, before, chosen.batch)

    def _reward_model(self, before: float, votes: int) -> bool:
        """Whether there is one for this cycle; it is fitted where there is none, and tried again with more votes."""
        if self._models.reward is not None:
            return True
        if votes < self._fit_at:
            return False
        limit = self._settings.reward.votes
        thumbs, pairs = self._buffer.newest(before, limit), self._buffer.newest_pairs(before, limit)
        total = reward_model.work(len(thumbs), len(pairs), self._settings)
        try:
            with task(f"reward model from {len(thumbs)} votes", total, self._stop) as progress:
                model = reward_model.fit(
                    self._policy,
                    thumbs,
                    pairs,
                    self._held_out(self._settings.reward.samples),
                    self._settings,
                    self._random,
                    progress,
                )
        except reward_model.NoSignal as error:
            self._fit_at = 2 * votes  # each try has its chance of taking noise for a signal
            self._wait(f"no reward model: {error}")
            return False
        version = self._reward_version = model.save(self._rewards)
        self._models.reward = model
        metrics.record_reward(model.report)
        logger.info("reward model %s: %s", version, model.report)
        return True

    def update(self, examples: Examples) -> None:
        """One update, on disk with the votes that it learned from before anything else happens."""
        trainer, cursor = self._working()
        with task(f"update {cursor.updates + 1}", trainer.rows(examples), self._stop) as progress:
            result = trainer.update(examples, progress)
        self._set_aside(examples, result.left_out)
        if isinstance(result, Refused):
            return
        learned = without(examples, result.left_out)
        self._cursor = replace(cursor.after(learned), reward=self._reward_version)
        self._checkpoints.save(
            Checkpoint(self._cursor, self._policy.weights(), trainer.state(), self._random.get_state())
        )
        self._buffer.learned(spent(learned), "in the working weights")
        ups = sum(isinstance(example, Thumb) and example.up for example in learned)
        pairs = sum(isinstance(example, Pair) for example in learned)
        metrics.record_update(result, ups, len(learned) - ups - pairs, pairs)
        logger.info(
            "update %d of %d from %s by %s: %s; grad norm %.2f, %d steps, %s, %.0f tokens/s, %.1f s",
            *(self._cursor.updates, self._settings.updates_per_candidate, cursor.parent, self._settings.algorithm),
            ", ".join(f"{name.replace('_', ' ')} {figure:.3g}" for name, figure in result.figures.items()),
            *(result.grad_norm, result.steps),
            f"{pairs} pairs" if pairs else f"{ups} up {len(learned) - ups} down",
            *(result.tokens / result.seconds, result.seconds),
        )

    def _set_aside(self, examples: Examples, left_out: Mapping[int, str]) -> None:
        for i, why in left_out.items():
            for id in spent(examples[i : i + 1]):
                self._buffer.set_aside(id, why)
                logger.warning("vote %s is set aside: %s", id, why)

    def hold(self) -> Adapter | None:
        """The working weights inside the budget, as a version in the store; None when they cannot be held to it."""
        _, cursor = self._working()
        if (written := candidate.written(self._store, cursor)) is not None:
            return written
        trained = self._policy.weights()
        held_out = self._held_out(self._settings.kl_samples)

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
                "submitted %s (%s), from %d up %d down %d pairs",
                *(adapter.version, adapter.digest, cursor.ups, cursor.downs, cursor.pairs),
            )
        self._buffer.learned(cursor.feedback_ids, adapter.version if adapter else "dropped: outside of the KL budget")
        self._checkpoints.clear()
        self._cursor = self._trainer = self._models.reward = None
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
        self._algorithm = self._compute.algorithm = algorithms.make(self._settings, self._policy.width)
        self._models.parent = parent
        self._trainer = Trainer(self._policy, self._settings, self._algorithm, self._compute, self._models)

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
            if saved.cursor.reward:
                self._models.reward = reward_model.RewardModel.load(self._policy, self._rewards, saved.cursor.reward)
                self._reward_version = saved.cursor.reward
        except AdapterError as error:
            self._abandon(str(error))
            return
        assert self._trainer is not None
        self._trainer.restore(saved.trainer)
        self._random.set_state(saved.random)
        logger.info("goes on after update %d from %s", saved.cursor.updates, saved.cursor.parent)

    def _held_out(self, limit: int) -> list[list[int]]:
        """At most so many held-out prompts."""
        return self._buffer.held_out_prompts(limit) if self._prompts is None else self._prompts[:limit]

    def _wait(self, why: str) -> list[Thumb]:
        kind = re.sub(r"\d+", "", why)  # numbers change all the time
        if kind != re.sub(r"\d+", "", self._waits_for):
            logger.info("waiting: %s", why)
        self._waits_for = why
        return []

    def close(self) -> None:
        """Leave the log, release the files, let the other ranks go."""
        if isinstance(self._source, fresh.Engine):
            self._source.close()
        self._compute.dismiss()
        self._intake.close()
        self._buffer.close()
