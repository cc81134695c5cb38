"""Log-probabilities of completions, summed per sequence, without a tokens × vocabulary tensor in fp32.

Only the positions that predict a completion token reach the output layer: prompts are most of what a chat model reads,
and their logits would be most of the cost. The vocabulary goes by in blocks; the log-softmax is taken in fp32.
Not covered: models that change their logits after the output layer (soft caps, scales); `check_output_layer` says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from learner import attention, tail
from learner.prefix import Prefix
from thumbwheel.errors import SettingsError

BLOCK = 4096
"""Ids of the vocabulary whose logits are whole at a time: for 300 tokens 5 MB in fp32, which a cache holds."""


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


def buckets(rows: Sequence[Row], tokens: int = 512) -> Iterator[list[int]]:
    """Indexes of `rows`, neighbours in length together, at most `tokens` padded tokens (or one row) a bucket.

    Rows of one prompt stay together where they fit, with their prompt counted once.
    """
    order = sorted(_groups(rows, tokens), key=lambda group: _length(rows, group), reverse=True)
    while order:
        fit = max(1, tokens // _length(rows, order[0]))  # the first of a bucket is its longest
        yield [i for group in order[:fit] for i in group]
        order = order[fit:]


def _groups(rows: Sequence[Row], tokens: int | None = None) -> list[list[int]]:
    """Indexes of rows that have the same prompt, in the order of the first of each, at most `tokens` long."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for i, row in enumerate(rows):
        parts = groups.setdefault(tuple(row.prompt), [[]])
        if tokens is not None and parts[-1] and _length(rows, [*parts[-1], i]) > tokens:
            parts.append([])
        parts[-1].append(i)
    return [part for parts in groups.values() for part in parts]


def _length(rows: Sequence[Row], group: Sequence[int]) -> int:
    """Tokens of a prompt and of its answers one after the other."""
    return len(rows[group[0]].prompt) + sum(len(rows[i].completion) for i in group)


def completion_hidden(model: Any, rows: Sequence[Row], prefix: Prefix | None = None) -> Tensor:
    """Last hidden states of the positions that predict completion tokens, (Σ completion lengths) × width, row by row.

    Rows of one prompt are read as one sequence, the prompt and then each answer, which sees the prompt and itself alone
    and has the positions that it has alone. Where the model attends by tiles all sequences are one, without padding,
    and what is in `prefix`, with which all prompts begin, is not read again. An answer's last token is not read at all.
    """
    shared = _groups(rows)
    if attention.installed(model):
        return _read(model, rows, shared, flat=True, prefix=prefix)
    alone = [[i] for i in range(len(rows))]
    # A mask costs the fastest kernels, and long answers fill what a short prompt saves with padding.
    masks = model.config._attn_implementation == "sdpa" and attention.covers(model)
    pays = masks and _padded(rows, shared) < 0.75 * _padded(rows, alone)
    return _read(model, rows, shared if pays else alone, flat=False)


def _padded(rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> int:
    return len(groups) * max(_length(rows, group) for group in groups)


def _read(
    model: Any, rows: Sequence[Row], groups: Sequence[Sequence[int]], flat: bool, prefix: Prefix | None = None
) -> Tensor:
    """One forward pass over sequences laid end to end (`flat`) or padded on the right."""
    known = 0 if prefix is None else prefix.length
    lengths = [[len(rows[group[0]].prompt) - known, *(len(rows[i].completion) - 1 for i in group)] for group in groups]
    longest = max(map(sum, lengths))
    ids: list[int] = []
    positions: list[int] = []
    wanted: list[list[int]] = [[] for _ in rows]  # where in `ids` a row's completion is predicted
    for group, (start, *_) in zip(groups, lengths, strict=True):
        begin = len(ids)
        ids += rows[group[0]].prompt[known:]
        positions += range(known, known + start)
        for i in group:
            read = rows[i].completion[:-1]
            # Position p holds what predicts token p + 1.
            wanted[i] = [begin + start - 1, *range(len(ids), len(ids) + len(read))]
            ids += read
            positions += range(known + start, known + start + len(read))
        if not flat:
            padding = begin + longest - len(ids)
            ids += [0] * padding
            positions += [0] * padding
    count = 1 if flat else len(groups)
    options: dict[str, Any] = {}
    if flat:
        # A mask of four dimensions is handed on as it is: transformers makes none itself.
        options = {"spans": attention.spans(lengths, model.dtype, known), "attention_mask": torch.ones(1, 1, 1, 1)}
        if prefix is not None:
            options["before"] = prefix.layers
    elif any(len(group) > 1 for group in groups):
        options = {"attention_mask": attention.mask(lengths, longest).to(model.device)}
    if options:
        options["position_ids"] = torch.tensor(positions, device=model.device).view(count, -1)
    chosen = torch.tensor([place for places in wanted for place in places], device=model.device)
    early = flat and tail.installed(model)
    if early:
        options["wanted"] = chosen
    # Without options attention is causal over each row, so that no real position sees padding.
    hidden: Tensor = model.base_model(
        input_ids=torch.tensor(ids, device=model.device).view(count, -1), use_cache=False, **options
    ).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden if early else hidden.index_select(0, chosen)


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
    """The full distribution at a few positions, N × vocabulary in fp32. The caller keeps N small."""
    return _wide(functional.linear(hidden, head.weight, head.bias)).log_softmax(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _TokenLogprobs(torch.autograd.Function):
    """Block by block of the vocabulary, with the gradient to the hidden states taken on the way: W[y] − Σ_v p(v) W[v].

    The softmax's normaliser is found as the blocks go by (Milakov & Gimelshein, "Online normalizer calculation for
    softmax", arXiv 1805.02867, algorithm 3), and so is the mean of W; each weight of the output layer is read once for
    all tokens. The layer is frozen and gets no gradient. Backward costs one multiplication and keeps N × width.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        top = hidden.new_full((len(hidden), 1), -torch.inf, dtype=wide)
        total, chosen = torch.zeros_like(top), torch.full_like(top, torch.nan)  # which no id but a known one replaces
        slopes = ctx.needs_input_grad[0]
        mean = torch.zeros_like(hidden, dtype=wide)
        for start in range(0, len(weight), BLOCK):
            block = weight[start : start + BLOCK]
            logits = _wide(functional.linear(hidden, block, None if bias is None else bias[start : start + BLOCK]))
            place = targets[:, None] - start
            here = (place >= 0) & (place < len(block))
            chosen = torch.where(here, logits.gather(-1, place.clamp(0, len(block) - 1)), chosen)
            before, top = top, torch.maximum(top, logits.amax(-1, keepdim=True))
            shrunk, shares = (before - top).exp_(), logits.sub_(top).exp_()
            total.mul_(shrunk).add_(shares.sum(-1, keepdim=True))
            if slopes:
                mean.mul_(shrunk).add_(shares.to(weight.dtype) @ block)  # Σ_v p(v) W[v], up to the normaliser
        if slopes:
            ctx.save_for_backward((weight[targets] - mean / total).to(hidden.dtype))
        return (chosen - top - total.log()).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (outputs[0][:, None] * slopes).to(slopes.dtype), None, None, None
