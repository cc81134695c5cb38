"""What a step of the learner costs: tokens per second and peak memory against TRL's trainers, on the same rows.

    python -m bench.learner_vs_trl [--model DIR] [--rounds N]

The same rows (chats by the model's template about real text, prompts from the shortest that it makes, some 30 tokens,
to 600; answers as long as the model's own to everyday questions), the same model in bf16 (the demo's, unless --model
names another), the same LoRA adapter with the same weights, two threads, each contestant a process of its own:

    kto            KTOTrainer as it comes: KL on mismatched pairs, references in the step, checkpointing, batches of 8
    kto best       the same loss as ours (APO-zero), references computed once before, no checkpointing, rows sorted by
                   length, the fastest of several batch sizes, with and without autocast; the references are timed, too
    dpo, dpo best  DPOTrainer, likewise, on pairs
    ours, ours dpo the learner's own `Trainer.update`, references in the step, batches of 16 rows

A token counts once a step, padding never; a prompt that a pair shares counts with both of its answers. Each contestant
warms up on rows that do not count. First it is checked that both sides compute the same loss, in fp32 with an adapter
that is far from zero; what bf16 adds to that is printed. The last line is one JSON object: `kto_ratio`,
`kto_best_ratio` and `dpo_ratio` are our tokens per second divided by theirs, `memory_ratio` our peak of resident memory
divided by the smaller of theirs, for KTO or DPO, whichever is worse for us.
"""

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from learner.gguf import demo_model
from learner.logprobs import Row, completion_hidden, token_logprobs
from learner.sampler import sample
from thumbwheel.demo.prompts import TRAFFIC_SUBJECTS, questions

ROOT = Path(__file__).parent.parent
THREADS = 2
RANK = 8
BETA = 0.1
BATCH = 16
"""Rows of an optimizer step of ours: the default of [learner] batch."""
ANSWER_TOKENS = 256
"""The longest answer: a limit that an app would set."""
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Measured:
    """Of one contestant's run: seconds of its steps, real tokens that they read, peak resident memory in bytes."""

    seconds: float
    tokens: int
    peak: int

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def answer_lengths(model: Path, count: int) -> list[int]:
    """Of real answers: tokens of what the model says to everyday questions, not asked to be brief, at temperature 1."""
    from bench.algorithms import Words

    policy, words = our_policy(model), Words(model)
    prompts = [words.prompt(question) for question in questions(TRAFFIC_SUBJECTS, count, seed=0, wish="")]
    with policy.reference():
        rows = sample(policy.model, prompts, ANSWER_TOKENS, policy.stop, torch.Generator().manual_seed(0))
    return [len(row.completion) for row in rows]


def pairs(model: Path, lengths: Sequence[int], seed: int = 0) -> list[tuple[Row, Row]]:
    """Prompts with two answers each: chats about windows of this repository's own text, the answers of these lengths.

    A prompt is what the model's template makes of a message; the shortest has a message of one token.
    """
    from transformers import AutoTokenizer

    from bench.algorithms import Words

    tokenizer, words = AutoTokenizer.from_pretrained(model), Words(model)
    text = "\n".join(path.read_text() for path in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]))
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    chance = random.Random(seed)

    def window(length: int) -> list[int]:
        start = chance.randrange(len(ids) - length)
        return list(ids[start : start + length])

    made, count = [], len(lengths) // 2
    shortest = len(words.prompt("a"))
    for i in range(count):
        length = int(shortest * (600 / shortest) ** (i / (count - 1)))
        prompt = words.prompt(tokenizer.decode(window(length - shortest + 1)))
        answers = [[*window(length - 1), tokenizer.eos_token_id] for length in lengths[2 * i : 2 * i + 2]]
        made.append((Row(prompt, answers[0]), Row(prompt, answers[1])))
    chance.shuffle(made)
    return made


def adapter(shapes: dict[str, torch.Size], scale: float = 0.02) -> dict[str, Tensor]:
    """The same weights for every contestant, by peft's names: an adapter that has moved by some nats an answer."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shapes[name], generator=generator) * scale for name in sorted(shapes)}


# Their side.


def their_trainer(
    model: Path, kind: str, rows: Sequence[dict[str, Any]], place: str, dtype: Any, **options: Any
) -> Any:
    """A trainer of TRL, given token ids: what it does to text before is left out."""
    with mock.patch("trl.import_utils.is_vllm_available", return_value=False):
        import trl
    from datasets import Dataset  # type: ignore[import-untyped]
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Given:
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            if not getattr(self, "calculate_KL", False):
                return dataset
            size = options.get("per_device_train_batch_size", 8)

            def rotated(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
                return {"KL_completion_ids": batch["completion_ids"][-1:] + batch["completion_ids"][:-1]}

            return dataset.map(rotated, batched=True, batch_size=size)

    base = getattr(trl, f"{kind}Trainer")
    trainer = type("Trainer", (Given, base), {})(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        # Given a configuration, TRL's reference is the bare model, as ours is; given an adapter, it is that adapter.
        peft_config=LoraConfig(r=RANK, lora_alpha=16, target_modules=MODULES, task_type="CAUSAL_LM"),
        args=getattr(trl, f"{kind}Config")(
            output_dir=place,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            beta=BETA,
            **options,
        ),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    named = {name: parameter for name, parameter in trainer.model.named_parameters() if "lora_" in name}
    for name, weight in adapter({name: parameter.shape for name, parameter in named.items()}).items():
        named[name].data.copy_(weight)
    return trainer


def theirs(
    model: Path, kind: str, made: list[tuple[Row, Row]], warm: list[tuple[Row, Row]], **options: Any
) -> Measured:
    from transformers import TrainerCallback

    as_dicts = kto_dicts if kind == "KTO" else dpo_dicts
    batch = options.setdefault("per_device_train_batch_size", 8)
    precompute = options.get("precompute_ref_log_probs", False)
    if precompute:
        made = sorted(made, key=lambda pair: len(pair[0]))
    count = math.ceil(len(made) / batch)
    seconds = 0.0

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            nonlocal seconds
            if state.global_step > steps_to_warm:
                seconds += time.perf_counter() - self.began

    steps_to_warm = 1
    options |= {"train_sampling_strategy": "sequential", "max_steps": steps_to_warm + count}
    first = (warm * batch)[:batch]
    with tempfile.TemporaryDirectory() as place:
        trainer = their_trainer(model, kind, as_dicts([*first, *made]), place, torch.bfloat16, **options)
        if precompute:  # in the constructor, warm-up rows included: once more for the clock, on the rows that count
            from datasets import Dataset

            began = time.perf_counter()
            trainer._precompute_ref_logps(Dataset.from_list(as_dicts(made)), "timed", batch)
            seconds += time.perf_counter() - began
        trainer.add_callback(Clock())
        trainer.train()
    return Measured(seconds, tokens_of(kind, made), peak())


def kto_dicts(made: Sequence[tuple[Row, Row]]) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": row.prompt, "completion_ids": row.completion, "label": i % 2 == 0}
        for i, (row, _) in enumerate(made)
    ]


def dpo_dicts(made: Sequence[tuple[Row, Row]]) -> list[dict[str, Any]]:
    return [{"prompt_ids": a.prompt, "chosen_ids": a.completion, "rejected_ids": b.completion} for a, b in made]


def tokens_of(kind: str, made: Sequence[tuple[Row, Row]]) -> int:
    return sum(len(a) + (len(b) if kind == "DPO" else 0) for a, b in made)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Our side.


def our_policy(model: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    from learner.policy import Policy
    from thumbwheel.settings import EngineSettings, LearnerSettings, Settings

    policy = Policy.load(Settings(engine=EngineSettings(model=model.resolve()), learner=LearnerSettings(rank=RANK)))
    if dtype != torch.bfloat16:
        policy.model.to(dtype)
    policy.set_weights(adapter({name: weight.shape for name, weight in policy.weights().items()}))
    return policy


def our_trainer(policy: Any, kind: str) -> tuple[Any, Any, Any]:
    """A trainer as the learner has it, and what it is made of: the algorithm and the models."""
    from learner import algorithms
    from learner.compute import Compute
    from learner.models import LearnerModels
    from learner.trainer import Trainer
    from thumbwheel.settings import LearnerSettings

    settings = LearnerSettings(rank=RANK, algorithm=kind.lower(), learning_rate=1e-6, beta=BETA)
    algorithm = algorithms.make(settings, policy.width)
    compute = Compute(policy, algorithm)
    models = LearnerModels(policy, compute, settings, lambda _: [], torch.Generator(), threading.Event())
    return Trainer(policy, settings, algorithm, compute, models), algorithm, models


def examples(kind: str, made: Sequence[tuple[Row, Row]]) -> Any:
    from learner.examples import Pair, Thumb

    if kind == "KTO":
        return [Thumb(str(i), row.prompt, row.completion, i % 2 == 0, []) for i, (row, _) in enumerate(made)]
    return [Pair((str(i),), a.prompt, a.completion, b.completion, "votes") for i, (a, b) in enumerate(made)]


def our_loss(policy: Any, kind: str, made: Sequence[tuple[Row, Row]]) -> float:
    """Of a batch, without moving a weight."""
    _, algorithm, models = our_trainer(policy, kind)
    plan = algorithm.plan(examples(kind, made), models)
    loss, _ = algorithm(plan.batch(range(len(plan.rows)), models.policy(plan.rows)[0]))
    return float(loss)


def ours(model: Path, kind: str, made: list[tuple[Row, Row]], warm: list[tuple[Row, Row]]) -> Measured:
    trainer, _, _ = our_trainer(our_policy(model), kind)
    size = BATCH if kind == "KTO" else BATCH // 2
    trainer.update(examples(kind, warm[:size]))
    began = time.perf_counter()
    for start in range(0, len(made), size):
        trainer.update(examples(kind, made[start : start + size]))
    return Measured(time.perf_counter() - began, tokens_of(kind, made), peak())


def best(kind: str, size: int, autocast: bool) -> dict[str, Any]:
    """Settings under which TRL computes our loss as fast as it can."""
    loss = {"loss_type": "apo_zero_unpaired"} if kind == "KTO" else {}
    once = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    return {**loss, **once, "per_device_train_batch_size": size, "bf16": autocast}


def compare(model: Path, kind: str, made: list[tuple[Row, Row]]) -> dict[str, float]:
    """Both sides' loss on one batch in fp32 and bf16, and how far bf16 moves each token's log-prob (mean, nats)."""
    found: dict[str, float] = {}
    exact: list[Tensor] = []
    rows = [row for row, _ in made] if kind == "KTO" else [row for pair in zip(*made, strict=True) for row in pair]
    targets = torch.tensor([id for row in rows for id in row.completion])
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        options = best(kind, len(made), dtype == torch.bfloat16) | {"precompute_ref_log_probs": False}
        as_dicts = kto_dicts if kind == "KTO" else dpo_dicts
        with tempfile.TemporaryDirectory() as place:
            trainer = their_trainer(model, kind, as_dicts(made), place, dtype, max_steps=1, **options)
        batch = trainer.data_collator(as_dicts(made))
        trainer.model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            found[f"theirs {name}"] = trainer.compute_loss(trainer.model, batch).item()
            ids, shown = batch["input_ids"], batch["completion_mask"]
            labels = ids.masked_fill(shown == 0, -100)
            read = trainer.model(ids, attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
        their_tokens = read.log_probs[shown[:, 1:] == 1]
        policy = our_policy(model, dtype)
        found[f"ours {name}"] = our_loss(policy, kind, made)
        with torch.no_grad():
            our_tokens = token_logprobs(policy.model, completion_hidden(policy.model, rows), targets)
        if exact:
            for side, tokens in (("ours", our_tokens), ("theirs", their_tokens)):
                found[f"{side} off"] = (tokens - exact[0]).abs().mean().item()
        exact.append(our_tokens)
    return found


SETTINGS = ("1 autocast", "2 autocast", "4 autocast", "1 plain", "2 plain")
"""Batch sizes of TRL, with and without autocast. Larger ones pad more."""


def run(name: str, model: Path, lengths: Sequence[int]) -> Any:
    """In the contestant's own process. `name` is `ours KIND`, `theirs KIND [SIZE autocast|plain]` or `compare KIND`."""
    torch.set_num_threads(THREADS)
    made, warm = pairs(model, lengths), pairs(model, lengths[: 2 * BATCH], seed=1)
    match name.split():
        case ["compare", kind]:
            return compare(model, kind, made[:4])
        case ["ours", kind]:
            return ours(model, kind, made, warm).__dict__
        case ["theirs", kind]:
            return theirs(model, kind, made, warm).__dict__
        case ["theirs", kind, size, autocast]:
            return theirs(model, kind, made, warm, **best(kind, int(size), autocast == "autocast")).__dict__
    raise SystemExit(f"no contestant is called {name}")


def measure(name: str, model: Path, lengths: Sequence[int]) -> Any:
    command = [sys.executable, "-m", "bench.learner_vs_trl", "--contestant", name]
    command += ["--model", str(model), "--lengths", *map(str, lengths)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, measured: Sequence[Measured]) -> None:
    speeds = sorted(each.speed for each in measured)
    print(f"{name:32} {statistics.median(speeds):7.0f} tokens/s  [{speeds[0]:.0f}, {speeds[-1]:.0f}]", end="")
    print(f"  peak {max(each.peak for each in measured) / 2**20:6.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory that transformers loads; else the demo's model")
    parser.add_argument("--count", type=int, default=16, help="rows, and pairs, of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--lengths", type=int, nargs="+", help="of the answers, two a prompt; else the model's own")
    chosen = parser.parse_args()
    if chosen.contestant:
        warnings.filterwarnings("ignore")
        with redirect_stdout(sys.stderr):
            found = run(chosen.contestant, chosen.model, chosen.lengths)
        print(json.dumps(found))
        return
    model = chosen.model or demo_model(ROOT / ".cache" / "models")
    lengths = chosen.lengths or answer_lengths(model, 2 * chosen.count)
    print(f"answers of {min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} in the mean: ", end="")
    print(*lengths, flush=True)

    for kind in ("KTO", "DPO"):
        found = measure(f"compare {kind}", model, lengths)
        print(f"{kind}'s loss, ours and theirs: fp32 {found['ours fp32']:.5f} {found['theirs fp32']:.5f}, ", end="")
        print(f"bf16 {found['ours bf16']:.5f} {found['theirs bf16']:.5f}; a token's log-prob is off by ", end="")
        print(f"{found['ours off']:.4f} {found['theirs off']:.4f} nats in bf16", flush=True)
        assert abs(found["ours fp32"] - found["theirs fp32"]) < 1e-3, f"{kind}: the two sides compute different losses"

    fastest = {}
    for kind in ("KTO", "DPO"):
        tried = {setting: Measured(**measure(f"theirs {kind} {setting}", model, lengths)) for setting in SETTINGS}
        for setting, one in tried.items():
            show(f"theirs {kind} {setting}", [one])
        fastest[kind] = max(tried, key=lambda setting: tried[setting].speed)

    names = {"kto": "theirs KTO", "kto best": f"theirs KTO {fastest['KTO']}", "ours": "ours KTO"}
    names |= {"dpo": "theirs DPO", "dpo best": f"theirs DPO {fastest['DPO']}", "ours dpo": "ours DPO"}
    results: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(chosen.rounds):
        for name, command in names.items():
            results[name].append(Measured(**measure(command, model, lengths)))
    for name, measured in results.items():
        show(f"{name} ({names[name]})", measured)

    def ratio(ours: str, theirs: str) -> float:
        each = [a.speed / b.speed for a, b in zip(results[ours], results[theirs], strict=True)]
        return round(statistics.median(each), 2)

    def memory(ours: str, theirs: str) -> float:
        smaller = min(max(each.peak for each in results[name]) for name in (theirs, f"{theirs} best"))
        return max(each.peak for each in results[ours]) / smaller

    print(
        json.dumps(
            {
                "kto_ratio": ratio("ours", "kto"),
                "kto_best_ratio": ratio("ours", "kto best"),
                "dpo_ratio": ratio("ours dpo", "dpo"),
                "dpo_best_ratio": ratio("ours dpo", "dpo best"),
                "memory_ratio": round(max(memory("ours", "kto"), memory("ours dpo", "dpo")), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
