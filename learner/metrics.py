"""What the learner shows on /metrics. Base units; times are timestamps."""

import math

from prometheus_client import Counter, Gauge

from learner.kl import Estimate
from learner.reward_report import FitReport
from learner.trainer import Updated

votes = Gauge("thumbwheel_learner_votes", "Votes by what became of them", ["state"])
missing = Gauge("thumbwheel_learner_missing_votes", "1 while training waits for a vote of this rating", ["rating"])
held_out = Gauge("thumbwheel_learner_held_out_prompts", "Prompts that KL can be measured on")
open_candidates = Gauge("thumbwheel_learner_open_candidates", "Candidates that wait for a decision")
updates = Counter("thumbwheel_learner_updates", "Updates made")
learned = Counter("thumbwheel_learner_votes_learned", "Votes learned from, and pairs of them", ["rating"])
candidates = Counter("thumbwheel_learner_candidates", "Cycles that ended", ["outcome"])
loss = Gauge("thumbwheel_learner_loss", "Loss of the last update")
figures = Gauge("thumbwheel_learner_figure", "What the algorithm says of the last update, by its name", ["name"])
reward_auc = Gauge("thumbwheel_learner_reward_auc", "How well the reward model tells held-out ups from downs, 0 to 1")
reward_length = Gauge("thumbwheel_learner_reward_length_correlation", "Of its scores with the answers' length")
grad_norm = Gauge("thumbwheel_learner_grad_norm", "Gradient norm before clipping, last update")
last_update = Gauge("thumbwheel_learner_last_update_timestamp_seconds", "When the last update was made")
update_seconds = Counter("thumbwheel_learner_update_seconds", "Spent on updates")
tokens = Counter("thumbwheel_learner_tokens", "Tokens learned from, prompts included")
kl_mean = Gauge("thumbwheel_learner_kl_mean_nats", "KL to the reference a sequence, last measurement")
kl_upper = Gauge("thumbwheel_learner_kl_upper_nats", "Its upper confidence bound")
kl_budget = Gauge("thumbwheel_learner_kl_budget_nats", "What the upper bound must not pass")


def record_update(update: Updated, ups: int, downs: int, pairs: int) -> None:
    """After an update from this many of each."""
    updates.inc()
    learned.labels("up").inc(ups)
    learned.labels("down").inc(downs)
    learned.labels("pair").inc(pairs)
    loss.set(update.figures["loss"])
    for name, figure in update.figures.items():
        figures.labels(name).set(figure)
    grad_norm.set(update.grad_norm)
    last_update.set_to_current_time()
    update_seconds.inc(update.seconds)
    tokens.inc(update.tokens)


def record_reward(report: FitReport) -> None:
    """After a fit of the reward model."""
    reward_auc.set(report.held_out.auc.estimate if report.held_out.auc is not None else math.nan)
    reward_length.set(report.held_out.length_spearman)


def record_kl(estimate: Estimate) -> None:
    """After a measurement."""
    kl_mean.set(estimate.mean)
    kl_upper.set(estimate.upper)
