"""What each algorithm learns from one log: held-out thumbs before and after, KL, sense, speed, memory.

    python -m bench.algorithms [--only kto ppo …]

SmolLM2-135M-Instruct answers everyday questions, four times each; the demo's users ask it to be brief, and like an
answer that ends by itself within 25 tokens. All of it goes onto one log. Each algorithm is given that log, a real
`Learner`, the same KL budget and a process of its own; its candidate, held to the budget, then answers questions that
nobody has asked before. An answer counts as making sense when the base model finds its tokens no less likely than it
finds all but the worst twentieth of its own answers', place by place. `gspo` and `grpo` take the reward model that
`ppo` fitted. The last line is JSON.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from prometheus_client import REGISTRY
from rich.console import Console
from rich.table import Table

from learner.gguf import demo_model
from learner.logprobs import Row
from learner.loop import Learner
from learner.policy import Policy
from learner.reward_model import RewardModel
from learner.sampler import sample
from thumbwheel.daemon import configure_logging
from thumbwheel.demo.prompts import HELD_OUT_SUBJECTS, KL_SUBJECTS, TRAFFIC_SUBJECTS, questions
from thumbwheel.demo.users import PATIENCE, Answer
from thumbwheel.events import Choice, FeedbackSubmitted, ResponseGenerated, Sampling, Timings
from thumbwheel.log import SqliteLog, message_of
from thumbwheel.settings import EngineSettings, LearnerSettings, Settings
from thumbwheel.statistics import wilson
from thumbwheel.store import AdapterStore

MAX_TOKENS = 96
BUDGET = 3.0
BATCH = 64
"""Answers that are sampled side by side."""

COMMON: dict[str, Any] = {
    "metrics_port": 0,
    "target_modules": ["o_proj", "down_proj"],
    "kl_budget": BUDGET,
    "kl_prompts": Path("kl_prompts.jsonl"),
    "max_tokens": MAX_TOKENS,
    "settle_s": 0.0,
    "learning_rate": 1e-3,
}
FRESH: dict[str, Any] = {"batch": 16, "updates_per_candidate": 5, "reward": {"epochs": 2}}
CHOSEN: dict[str, dict[str, Any]] = {
    "kto": {"batch": 64, "updates_per_candidate": 8},
    "bco": {"batch": 64, "updates_per_candidate": 8},
    "dpo": {"batch": 16, "updates_per_candidate": 4},
    "ppo-logged": {"batch": 64, "updates_per_candidate": 8},
    "ppo": FRESH,
    "grpo": FRESH,
    "gspo": FRESH,
}
"""A learning rate for all of them, and as many updates as the log has votes, or pairs, for."""


def sampled(policy: Policy, prompts: list[list[int]], seed: int) -> list[Row]:
    """One answer a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for start in range(0, len(prompts), BATCH):
        rows += sample(policy.model, prompts[start : start + BATCH], MAX_TOKENS, policy.stop, generator)
        print(".", end="", file=sys.stderr, flush=True)
    return rows


def liked(policy: Policy, row: Row) -> bool:
    """What the demo's users would say."""
    ended = row.completion[-1] in policy.stop
    return Answer("", "", "", "stop" if ended else "length", len(row.completion), "").liked


class Words:
    """Questions as token ids, by the model's chat template."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def prompt(self, question: str) -> list[int]:
        message = [{"role": "user", "content": question}]
        ids: list[int] = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return ids

    def text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def record(policy: Policy, words: Words, place: Path, prompts: int, answers: int) -> None:
    """Fill a log: what users asked, what the base model answered, and their thumbs."""
    from learner.algorithm import Algorithm
    from learner.compute import Compute

    asked = [question for question in questions(TRAFFIC_SUBJECTS, prompts, seed=2) for _ in range(answers)]
    rows = sampled(policy, [words.prompt(question) for question in asked], seed=5)
    behaviour, _ = Compute(policy, Algorithm(LearnerSettings(), policy.width)).read(rows)
    log = SqliteLog(place / "log.sqlite")
    for i, (question, row) in enumerate(zip(asked, rows, strict=True)):
        ended = row.completion[-1] in policy.stop
        response = ResponseGenerated(
            source="gateway/bench",
            response_id=f"r{i}",
            endpoint="chat.completions",
            outcome="completed",
            replica="bench",
            version="base",
            digest="",
            api_key="bench",
            request={"messages": [{"role": "user", "content": question}]},
            prompt_token_ids=[row.prompt],
            choices=[
                Choice(
                    index=0,
                    text=words.text(row.completion),
                    finish_reason="stop" if ended else "length",
                    token_ids=row.completion,
                    logprobs=[min(0.0, value) for value in behaviour[i, : len(row.completion)].tolist()],
                )
            ],
            sampling=Sampling(max_tokens=MAX_TOKENS),
            timings=Timings(duration_s=1.0),
        )
        thumb = FeedbackSubmitted(
            source="gateway/bench",
            response_id=f"r{i}",
            rating="up" if liked(policy, row) else "down",
            api_key="bench",
            user=f"user-{i % 40}",
            time=time.time() - 3600 + i,
        )
        for event in (response, thumb):
            log.append(event.topic, [message_of(event)])
    log.close()


def sense(policy: Policy, rows: list[Row]) -> list[list[float]]:
    """−log p of each token under the base model, nats."""
    from learner.algorithm import Algorithm
    from learner.compute import Compute

    read = Compute(policy, Algorithm(LearnerSettings(), policy.width)).reference(rows)
    return [(-read[i, : len(row.completion)]).tolist() for i, row in enumerate(rows)]


def surprise(each: list[float], usual: list[float]) -> float:
    """How much less likely than usual an answer's tokens are, nats a token; `usual` is the base's mean by place."""
    return sum(nats - usual[place] for place, nats in enumerate(each)) / len(each)


def prepare(model: Path, place: Path, prompts: int, answers: int, held_out: int) -> dict[str, Any]:
    """The log, the prompts to measure KL on, and what the base model does with the held-out questions."""
    settings = Settings(data=place, engine=EngineSettings(model=model), learner=LearnerSettings(**COMMON))
    policy, words = Policy.load(settings), Words(model)
    record(policy, words, place, prompts, answers)
    with open(place / "kl_prompts.jsonl", "w") as file:
        for question in questions(KL_SUBJECTS, 64, seed=4):
            file.write(json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n")
    asked = [words.prompt(question) for question in questions(HELD_OUT_SUBJECTS, held_out, seed=1)]
    rows = sampled(policy, asked, seed=6)
    each = sense(policy, rows)
    columns = [[one[at] for one in each if at < len(one)] for at in range(MAX_TOKENS)]
    usual = [sum(column) / len(column) if column else 0.0 for column in columns]
    limit = sorted(surprise(one, usual) for one in each)[int(0.95 * len(each))]
    found = wilson(sum(liked(policy, row) for row in rows), len(rows))
    result = {"ups": found.estimate, "ups_low": found.low, "ups_high": found.high, "sense": 0.95}
    (place / "base.json").write_text(json.dumps({"usual": usual, "limit": limit, "asked": asked, "result": result}))
    return result


def learn(name: str, model: Path, place: Path) -> dict[str, Any]:
    """One algorithm, from the log to held-out thumbs."""
    base = json.loads((place / "base.json").read_text())
    data = place / name
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    shutil.copy(place / "log.sqlite", data)
    shutil.copy(place / "kl_prompts.jsonl", data)
    chosen = LearnerSettings(algorithm=name, **{**COMMON, **CHOSEN[name]})
    settings = Settings(data=data, engine=EngineSettings(model=model), learner=chosen)
    log, policy = SqliteLog(settings.path(settings.log.path)), Policy.load(settings)
    learner = Learner(settings, log, policy, threading.Event())
    if name in ("grpo", "gspo") and (place / "ppo" / "learner" / "rewards").is_dir():
        learner._models.reward = RewardModel.load(policy, place / "ppo" / "learner" / "rewards")
    started = time.perf_counter()
    while not learner._rollout.state.open():
        if not learner.step():
            raise SystemExit(f"{name} does not learn: {learner._waits_for}")
        learner.poll()
    seconds = time.perf_counter() - started
    store = AdapterStore(settings.path(settings.store.path))
    (version,) = store.versions()
    adapter = store.verify(version)
    policy.start(adapter)
    rows = sampled(policy, base["asked"], seed=6)
    found = wilson(sum(liked(policy, row) for row in rows), len(rows))
    sensible = [surprise(each, base["usual"]) <= base["limit"] for each in sense(policy, rows)]
    learned = adapter.manifest.learned_from
    spent = REGISTRY.get_sample_value("thumbwheel_learner_update_seconds_total") or 0.0
    tokens = REGISTRY.get_sample_value("thumbwheel_learner_tokens_total") or 0.0
    learner.close()
    log.close()
    return {
        "ups": found.estimate,
        "ups_low": found.low,
        "ups_high": found.high,
        "kl": adapter.manifest.kl.mean,
        "kl_upper": adapter.manifest.kl.upper,
        "scale": adapter.manifest.kl.scale,
        "sense": sum(sensible) / len(sensible),
        "tokens_per_s": tokens / spent,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": seconds,
        "thumbs": learned.ups + learned.downs,
        "pairs": learned.pairs,
        "mean_length": sum(len(row.completion) for row in rows) / len(rows),
    }


def show(before: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    """The table."""
    table = Table(title=f"held-out thumbs up, KL budget {BUDGET:g} nats an answer; an up is an end within {PATIENCE}")
    for column in ("", "ups", "95%", "KL (upper)", "sense", "thumbs", "pairs", "tokens/s", "peak MB", "wall s"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("base", f"{before['ups']:.0%}", f"{before['ups_low']:.0%}–{before['ups_high']:.0%}", "0", "95%")
    for name, one in results.items():
        table.add_row(
            name,
            f"{one['ups']:.0%}",
            f"{one['ups_low']:.0%}–{one['ups_high']:.0%}",
            f"{one['kl']:.2f} ({one['kl_upper']:.2f})",
            f"{one['sense']:.0%}",
            *(f"{one[key]:.0f}" for key in ("thumbs", "pairs", "tokens_per_s", "peak_mb", "seconds")),
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CHOSEN), default=list(CHOSEN))
    parser.add_argument("--prompts", type=int, default=160, help="different questions on the log [160]")
    parser.add_argument("--answers", type=int, default=4, help="answers to each [4]")
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--place", type=Path, help="keep everything here, and go on from what is there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = demo_model(Path(".cache") / "models").absolute()
    place = (given.place or Path(tempfile.mkdtemp(prefix="thumbwheel-bench-"))).absolute()
    place.mkdir(parents=True, exist_ok=True)
    if given.one:
        configure_logging(given.one)
    if given.one == "base":
        print(json.dumps(prepare(model, place, given.prompts, given.answers, given.held_out)))
        return
    if given.one:
        print(json.dumps(learn(given.one, model, place)))
        return
    results: dict[str, dict[str, Any]] = {}
    for name in ("base", *given.only):  # a process each: peak memory is its own
        kept = place / f"{name}.result.json"
        if not kept.exists():
            sizes = [f"--{key}={getattr(given, key.replace('-', '_'))}" for key in ("prompts", "answers", "held-out")]
            command = [sys.executable, "-m", "bench.algorithms", "--one", name, "--place", str(place), *sizes]
            print(f"{name} ", end="", file=sys.stderr, flush=True)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            kept.write_text(done.stdout.splitlines()[-1])
            print(file=sys.stderr)
        results[name] = json.loads(kept.read_text())
    before = results.pop("base")
    show(before, results)
    doubled = {name: one["ups"] >= 2 * before["ups"] for name, one in results.items()}
    inside = {name: one["kl_upper"] <= BUDGET for name, one in results.items()}
    print(json.dumps({"base": before, "results": results, "doubled": doubled, "inside": inside}))
    if given.place is None:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
