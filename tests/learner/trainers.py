"""What trainers of TRL are given, of whatever version, and our side of the comparison: the policy and its log-probs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.logprobs import Row, buckets, sequence_logprobs
from learner.policy import Policy
from tests.learner.conftest import VOCABULARY, move, tiny
from thumbwheel.settings import Settings

MAX_LENGTH = 8
"""TRL cuts prompt and answer off here; ours are given the rows as the log has them, cut off already."""

ROWS = [
    (Row([2, 3], [4, 5, 1]), True),
    (Row([6], [7, 8, 9, 1]), False),
    (Row([10, 11, 12], [13, 1]), False),
    (Row([14, 15], [16, 17, 18, 19, 1]), True),
    (Row([20], [21, 22, 1]), False),
]
CASES = {
    "five": ROWS,
    "two": ROWS[:2],
    "one": ROWS[:1],
    "ups": [(row, True) for row, _ in ROWS],
    "downs": [(row, False) for row, _ in ROWS[:3]],
    "one prompt twice": [*ROWS, (Row([2, 3], [24, 25, 1]), False), (Row([2, 3], [24, 1]), True)],
    "one prompt": [(Row([2, 3], row.completion), up) for row, up in ROWS],
    "the same row twice": [*ROWS, ROWS[0]],
    "one token": [(Row(row.prompt, row.completion[:1]), up) for row, up in ROWS],
    "cut off": [(Row(row.prompt, [*row.completion[:-1], 26, 27, 28, 29, 30]), up) for row, up in ROWS],
}


def cut(row: Row) -> Row:
    return Row(row.prompt, row.completion[: MAX_LENGTH - len(row.prompt)])


def tokenizer(pad: int = 0) -> Any:
    """Of words t0, t1, …, one a token; t1 ends a turn. Padding may be a token that the model does not have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {f"t{id}": id for id in range(max(VOCABULARY, pad + 1))}
    words = Tokenizer(models.WordLevel(ids, unk_token="t31"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"t{pad}", eos_token="t1", padding_side="left")


def config(kind: Any, place: Path, **options: Any) -> Any:
    return kind(output_dir=str(place), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **options)


def dataset(*rows: dict[str, Any]) -> Any:
    """What a trainer asks for when it is made; the rows that are compared go to its collator."""
    from datasets import Dataset  # type: ignore[import-untyped]

    return Dataset.from_list(list(rows))


def trained(model: Any) -> dict[str, Tensor]:
    """The parameters of an adapter that is being trained, by the names that they have in the model below it."""
    return {
        name.replace("base_model.model.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def policy(settings: Settings) -> Policy:
    """Away from its reference by some nats an answer, in a direction in which z0 is positive for most of the cases."""
    made = Policy(tiny(), settings, "sha256:test")
    move(made, 0.3, seed=3)
    return made


def scored(policy: Policy, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Sequence log-probs of policy and reference, bucket by bucket; the first with its gradient."""
    ours, reference = torch.zeros(len(rows)), torch.zeros(len(rows))
    for bucket in buckets(rows, tokens=16):
        part = [rows[i] for i in bucket]
        ours = ours.index_copy(0, torch.tensor(bucket), sequence_logprobs(policy.model, part))
        with torch.no_grad(), policy.reference():
            reference[bucket] = sequence_logprobs(policy.model, part)
    return ours, reference
