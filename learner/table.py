"""What was found in a log, and what came of an update: tables for a person, JSON for a script.

Colours are left out by `click.echo` off a terminal.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from learner.once import Outcome
from learner.reward_report import FitReport
from learner.survey import Lengths, Survey
from thumbwheel.statistics import Interval

FIGURES: dict[str, tuple[str, str]] = {
    "loss": ("", "what the steps bring down; mean over the batch"),
    "policy_loss": ("", "the part of the loss that moves the policy, mean a token"),
    "value_loss": ("", "half the squared error of the value head, mean a token"),
    "reward_up": ("β·nats", "how much likelier ups are than under the reference, times β; to rise"),
    "reward_down": ("β·nats", "the same of downs; to fall"),
    "reward_chosen": ("β·nats", "how much likelier chosen answers are than under the reference, times β"),
    "reward_rejected": ("β·nats", "the same of rejected answers; to fall"),
    "margin": ("β·nats", "the first of these two less the second; to rise"),
    "accuracy": ("share", "examples on the right side already; half by chance"),
    "saturated": ("share", "votes that teach less than a tenth of what they did at first"),
    "settled": ("share", "examples learned so well that they hardly teach"),
    "falling": ("share", "pairs whose chosen answer became less likely too; watch it when it rises"),
    "z0": ("nats", "KTO's point of reference; below 0, 0 is used"),
    "delta": ("β·nats", "BCO's point between ups and downs, from the updates before"),
    "moved": ("nats a token", "KL from the policy before the update to the one now"),
    "clipped": ("share", "tokens that the clip keeps from moving further; of gspo, answers"),
    "explained": ("share", "of the returns' variance that the value head foretold; 1 at best"),
    "flat": ("share", "answers in groups whose rewards are all alike: they teach nothing"),
    "reward": ("spreads", "mean reward of the fresh answers; 0 is a usual answer of the reference"),
    "kl": ("nats", "of the fresh answers to the reference, mean an answer"),
    "beta": ("reward a nat", "what a nat of KL costs"),
    "weight": ("", "mean weight of logged tokens, policy to recorded; about 1 where they agree"),
    "effective": ("share", "what a logged token is worth in fresh ones; refused below 0.3"),
}
"""Unit and meaning of what algorithms say of an update."""


def as_json(found: Survey | Outcome) -> str:
    """One object; what is no finite number is null."""
    more: dict[str, Any] = {"ready": found.ready} if isinstance(found, Survey) else {}
    plain = asdict(found) | more
    if isinstance(found, Outcome):
        plain["kl"]["inside"] = found.kl.inside
    return json.dumps(_finite(plain), indent=2, allow_nan=False)


def of_survey(survey: Survey) -> str:
    """What there is, and what each algorithm lacks."""
    there = _table("", "count", "of which")
    _add(there, "records: responses", survey.records["responses"], f"{survey.responses} distinct")
    _add(there, "records: feedback", survey.records["feedback"])
    _add(there, "records: unreadable", sum(survey.unreadable.values()), _list(survey.unreadable))
    _add(there, "answers", survey.answers)
    _add(there, "answers: may be learned from", survey.answers - sum(survey.refused.values()))
    _add(there, "answers: may not", sum(survey.refused.values()), _list(survey.refused))
    for state, reasons in survey.votes.items():
        _add(there, f"votes: {state.replace('_', ' ')}", sum(reasons.values()), _list(reasons))
    _add(there, "ready and settled", survey.ups + survey.downs, f"{survey.ups} up, {survey.downs} down")
    _add(there, "  by users", survey.users)
    _add(there, "  on versions", len(survey.versions), _list(survey.versions))
    _add(there, "  on answers", survey.learnable, f"{survey.with_logprobs} with recorded log-probs")
    _add(there, "  on prompts", survey.prompts)
    _add(there, "  pairs", sum(survey.pairs.values()), _list(survey.pairs))
    _add(there, "  tokens of prompts", survey.prompt_tokens.total, _spread(survey.prompt_tokens))
    _add(there, "  tokens of answers", survey.answer_tokens.total, _spread(survey.answer_tokens))
    _add(there, "held-out prompts", survey.held_out_prompts, "to measure KL on; their answers are not learned from")
    able = _table("algorithm", "update", "what is missing")
    for name, lacks in survey.lacks.items():
        word = Text("no", "red") if lacks else Text("yes", "green")
        _add(able, Text(name, "bold") if name == survey.algorithm else name, word, "\n".join(lacks))
    return _text(Text(f"{survey.log}, for batches of {survey.batch}", "bold"), there, "", able)


def of_outcome(outcome: Outcome) -> str:
    """The algorithm's figures, what the update took, the reward model, and how far the policy moved."""
    of = f"{outcome.pairs} pairs" if outcome.pairs else f"{outcome.ups} up, {outcome.downs} down"
    title = Text(f"{outcome.log}: one update by {outcome.algorithm} from {of}", "bold")
    shown = _table("figure", "value", "unit", "what it says")
    for name, value in outcome.figures.items():
        _add(shown, name, value, *FIGURES.get(name, ("", "")))
    took = _table("update", "value", "unit", "what it says")
    _add(took, "gradient norm", outcome.grad_norm, "", "the largest, before clipping")
    _add(took, "steps", outcome.steps, "", "of the optimizer")
    _add(took, "tokens", outcome.tokens, "", "of the rows gone over, prompts included")
    _add(took, "time", outcome.seconds, "s", "of the update alone")
    _add(took, "speed", outcome.tokens_per_second, "tokens/s")
    _add(took, "memory", outcome.peak_bytes / 2**30, "GiB", "the most that the process has held")
    if outcome.peak_device_bytes is not None:
        _add(took, "GPU memory", outcome.peak_device_bytes / 2**30, "GiB", "the most that tensors have held")
    _add(took, "left out", len(outcome.left_out), "", _list(_count(example.why for example in outcome.left_out)))
    _add(took, "unreadable", outcome.unreadable, "", "records of the log; --dry-run says why")
    found = outcome.kl
    moved = _table("KL to the reference", "value", "unit", "what it says")
    _add(moved, "mean", found.mean, "nats", f"a sequence, on {found.n} held-out prompts; {found.per_token:.3g} a token")
    verdict = "inside the budget" if found.inside else "outside of the budget: a learner would scale the update back"
    word = Text(f"{verdict} ({found.confidence:.0%} sure)", "green" if found.inside else "red")
    _add(moved, "at most", found.upper, "nats", word)
    _add(moved, "budget", found.budget, "nats", "[learner] kl_budget")
    fitted: list[RenderableType] = [] if outcome.reward is None else [_reward(outcome.reward), ""]
    return _text(title, shown, "", took, "", *fitted, moved)


def _reward(report: FitReport) -> Table:
    held = report.held_out
    shown = _table("reward model", "value", "interval", "what it says")
    _add(shown, "learned from", report.thumbs + report.pairs, "", f"{report.thumbs} votes, {report.pairs} pairs")
    tested = f"{held.ups} up, {held.downs} down, {held.pairs} pairs, on prompts that it has not seen"
    _add(shown, "tested on", held.ups + held.downs + held.pairs, "", tested)
    _add(shown, "AUC", *_interval(held.auc), "how often an up scores higher than a down; half by chance")
    _add(shown, "pairs", *_interval(held.pair_accuracy), "how often the better answer scores higher")
    _add(shown, "accuracy", *_interval(held.accuracy), "votes foretold, effects of user, topic and length included")
    _add(shown, "Brier score", held.brier, "", "mean squared error of the foretold share of ups")
    _add(shown, "length", held.length_spearman, "", "rank correlation of scores with the answers' length")
    _add(shown, "spread", report.spread, "", "of scores among answers of the reference; the unit of rewards")
    within = "the same among answers to one prompt, which alone can teach a policy"
    _add(shown, "spread within", report.spread_within, "", within)
    _add(shown, "time", report.seconds, "", "seconds")
    return shown


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i == 1 else "left", no_wrap=i < len(columns) - 1)
    return table


def _add(table: Table, *cells: str | Text | float | None) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else Text(_printable(_word(cell))) for cell in cells))


def _word(cell: str | float | None) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _printable(text: str) -> str:
    """What people and programs wrote may not steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "·" for letter in text)


def _list(counts: Mapping[str, int]) -> str:
    """One line each; nothing where all that there is has no name."""
    return "" if set(counts) <= {""} else "\n".join(f"{n} {name}" for name, n in counts.items())


def _count(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _spread(lengths: Lengths) -> str:
    return f"half have at most {lengths.p50}, 90% {lengths.p90}, 99% {lengths.p99}, the longest {lengths.longest}"


def _interval(found: Interval | None) -> tuple[float | None, str]:
    return (None, "") if found is None else (found.estimate, f"{found.low:.3g} … {found.high:.3g}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(*parts: RenderableType) -> str:
    """As wide as the terminal; off a terminal wide enough for most lines."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 140
    console = Console(width=width, force_terminal=True)
    with console.capture() as capture:
        console.print(Group(*parts))
    return capture.get().rstrip()
