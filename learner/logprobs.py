"""Log-probabilities of completions, summed per sequence, without a tokens × vocabulary tensor in fp32.

Only the positions that predict a completion token reach the output layer: prompts are most of what a chat model reads,
and their logits would be most of the cost. What is left goes through it in chunks; the log-softmax is taken in fp32.
Not covered: models that change their logits after the output layer (soft caps, scales); `check_output_layer` says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from thumbwheel.errors import SettingsError

CHUNK = 256
"""Rows of logits that are whole at a time: 256 × 49152 in fp32 is 50 MB."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with one completion, as token ids. Both have at least one token."""

    prompt: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def check_output_layer(config: Any) -> None:
    """Raise SettingsError for a model whose logits are more than its output layer applied to its last hidden state."""
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise SettingsError(f"the learner cannot train models with {name}; this one ([engine] model) has it")


def buckets(rows: Sequence[Row], tokens: int = 2048) -> Iterator[list[int]]:
    """Indexes of `rows`, neighbours in length together, at most `tokens` padded tokens (or one row) a bucket."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)  # the first of a bucket is its longest
    while order:
        fit = max(1, tokens // len(rows[order[0]]))
        yield order[:fit]
        order = order[fit:]


def completion_hidden(model: Any, rows: Sequence[Row]) -> Tensor:
    """Last hidden states of the positions that predict completion tokens, (Σ completion lengths) × width, row by row.

    Rows are padded on the right and no mask is given: attention is causal, so that no real position sees padding.
    """
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row.prompt + row.completion + [0] * (longest - len(row)) for row in rows], device=model.device)
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # rows × longest × width
    # Position p holds what predicts token p + 1.
    return torch.cat([hidden[i, len(row.prompt) - 1 : len(row) - 1] for i, row in enumerate(rows)])


def token_logprobs(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p(target) at each position: N hidden states, N ids → N values in fp32 (fp64 for an fp64 model), nats."""
    head = model.get_output_embeddings()
    result: Tensor = _TokenLogprobs.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return result


def sequence_logprobs(model: Any, rows: Sequence[Row]) -> Tensor:
    """log p(completion | prompt) of each row, nats; one forward pass for all of them, so give it a bucket."""
    targets = torch.tensor([id for row in rows for id in row.completion], device=model.device)
    each = token_logprobs(model, completion_hidden(model, rows), targets)
    return torch.stack([part.sum() for part in torch.split(each, [len(row.completion) for row in rows])])


def log_softmax(head: Any, hidden: Tensor) -> Tensor:
    """The full distribution at a chunk of positions, N × vocabulary in fp32. The caller keeps N small."""
    return _wide(functional.linear(hidden, head.weight, head.bias)).log_softmax(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _TokenLogprobs(torch.autograd.Function):
    """Chunked, with the gradient to the hidden states taken while the logits are there: W[y] − Σ_v p(v) W[v].

    The output layer is frozen and gets none. Backward costs one multiplication and keeps N × width, not N × vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        values, slopes = [], []
        for rows, wanted in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            logits = _wide(functional.linear(rows, weight, bias))  # chunk × vocabulary
            logits -= logits.logsumexp(-1, keepdim=True)
            values.append(logits.gather(-1, wanted[:, None]).squeeze(-1))
            if ctx.needs_input_grad[0]:
                slopes.append(weight[wanted] - logits.exp_().to(weight.dtype) @ weight)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (outputs[0][:, None] * slopes).to(slopes.dtype), None, None, None
