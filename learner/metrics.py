"""What the learner shows on /metrics. Base units; times are timestamps."""

from prometheus_client import Counter, Gauge

from learner.kl import Estimate
from learner.trainer import Updated

votes = Gauge("thumbwheel_learner_votes", "Votes by what became of them", ["state"])
missing = Gauge("thumbwheel_learner_missing_votes", "1 while training waits for a vote of this rating", ["rating"])
held_out = Gauge("thumbwheel_learner_held_out_prompts", "Prompts that KL can be measured on")
open_candidates = Gauge("thumbwheel_learner_open_candidates", "Candidates that wait for a decision")
updates = Counter("thumbwheel_learner_updates", "Updates made")
learned = Counter("thumbwheel_learner_votes_learned", "Votes learned from", ["rating"])
candidates = Counter("thumbwheel_learner_candidates", "Cycles that ended", ["outcome"])
loss = Gauge("thumbwheel_learner_loss", "Loss of the last update")
margin = Gauge("thumbwheel_learner_reward_margin", "Mean reward of ups less that of downs, last update")
saturated = Gauge("thumbwheel_learner_saturated_ratio", "Share of rows that hardly pull any more, last update")
grad_norm = Gauge("thumbwheel_learner_grad_norm", "Gradient norm before clipping, last update")
last_update = Gauge("thumbwheel_learner_last_update_timestamp_seconds", "When the last update was made")
update_seconds = Gauge("thumbwheel_learner_update_seconds", "How long the last update took")
tokens_per_second = Gauge("thumbwheel_learner_tokens_per_second", "Tokens trained on a second, last update")
kl_mean = Gauge("thumbwheel_learner_kl_mean_nats", "KL to the reference a sequence, last measurement")
kl_upper = Gauge("thumbwheel_learner_kl_upper_nats", "Its upper confidence bound")
kl_budget = Gauge("thumbwheel_learner_kl_budget_nats", "What the upper bound must not pass")


def record_update(update: Updated, ups: int, downs: int) -> None:
    """After an update from this many votes."""
    updates.inc()
    learned.labels("up").inc(ups)
    learned.labels("down").inc(downs)
    loss.set(update.diagnostics.loss)
    margin.set(update.diagnostics.margin)
    saturated.set(update.diagnostics.saturated)
    grad_norm.set(update.grad_norm)
    last_update.set_to_current_time()
    update_seconds.set(update.seconds)
    tokens_per_second.set(update.tokens / update.seconds)


def record_kl(estimate: Estimate) -> None:
    """After a measurement."""
    kl_mean.set(estimate.mean)
    kl_upper.set(estimate.upper)
