"""Attention over rows that are laid out one after the other in one sequence, without padding and without a mask.

transformers' models call it through `AttentionInterface`. It works tile by tile: at most `TILE` queries against the
keys that they may see, so that the causal half is not computed and no more than a tile of scores is in memory; backward
computes them again. Queries that share a key head are multiplied together (grouped queries), keys are never repeated.
Scores are products in the model's dtype, as they are in eager attention, and so are probabilities; in between, torch's
softmax computes in fp32.

In Llama's layers the rotation of queries and keys (Su et al., "RoFormer", arXiv 2104.09864, equation 34) happens while
they are laid out for it. What all sequences begin with can be left out of them (`learner/prefix.py`): each query sees
its keys and values, which another pass has kept.

For CPUs, where torch's own kernel takes two to five times as long on chat-sized rows; with AMX it is the faster one in
forward and the slower one in backward, and an update gains nothing by it. What a tile works with is its thread's
scratch memory. Covered: causal models in which every layer attends to everything (`covers`). A call without spans goes
to transformers' sdpa.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner import fused, lora
from learner.scratch import room

NAME = "tiles"
TILE = 128
ALIGN = 16
"""Products are fastest where a tile's keys are a multiple of so many."""

Seen = tuple[Tensor, Tensor]
"""Keys, rotated, and values of a layer, key heads × tokens × width each."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [start, stop), which see the keys of their span up to `stop` at most.

    `bias`, queries × 1 × keys, is added to the scores of the last of these keys: −inf where a query must not see it,
    else 0. It is a multiple of `ALIGN` wide where there are keys enough: what is left over is slow to add.
    """

    start: int
    stop: int
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) that see each other, tile by tile, and no others but what came before all of them."""

    start: int
    stop: int
    tiles: list[Tile]


def covers(model: Any) -> bool:
    """Whether each layer of a transformers model is plain attention to everything before, through its interface."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    full = set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return bool(full and model._supports_attention_backend and not model._is_stateful and not capped)


def install(model: Any) -> None:
    """Make `model` attend by tiles where it is given spans and this module is the fastest; it has to be on a CPU."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.models.llama.modeling_llama import LlamaAttention

    if model.device.type != "cpu" or not covers(model):
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    for module in model.modules():
        if fused.alike(module, LlamaAttention):
            module.forward = partial(layer, module)


def installed(model: Any) -> bool:
    """Whether `model` reads rows laid end to end, without padding."""
    return bool(model.config._attn_implementation == NAME)


def spans(groups: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, known: int = 0) -> list[Span]:
    """Of sequences laid end to end, each a prompt and its answers: their lengths, the prompt first.

    An answer sees its prompt and itself; before each sequence come so many `known` tokens that are not laid out.
    `dtype` is that of the scores.
    """
    parts = [_parts(lengths) for lengths in groups]
    together: list[list[int]] = []  # one long sequence, or several short ones that fit into a tile
    for i, part in enumerate(parts):
        if together and sum(len(parts[j]) for j in together[-1]) + len(part) <= TILE:
            together[-1].append(i)
        else:
            together.append([i])
    made, start = [], 0
    for chosen in together:
        part = torch.cat([parts[i] for i in chosen])
        owner = torch.tensor(chosen).repeat_interleave(torch.tensor([len(parts[i]) for i in chosen]))
        made.append(Span(start, start + len(part), _tiles(part, owner, start, dtype, known)))
        start += len(part)
    return made


def _tiles(part: Tensor, owner: Tensor, begin: int, dtype: torch.dtype, known: int) -> list[Tile]:
    """Of a span: which part of which sequence each of its tokens belongs to."""
    made = []
    for start, stop in pairwise([0, *range(TILE - known % ALIGN, len(part), TILE), len(part)]):
        queries, keys = torch.arange(start, stop)[:, None], torch.arange(stop)
        hidden = ~(_seen(part, queries, keys) & (owner[queries] == owner[keys]))
        count = stop - int(torch.cat([hidden.any(0), torch.ones(1, dtype=torch.bool)]).int().argmax())
        edge = max(0, stop - ALIGN * ceil(count / ALIGN))
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        made.append(Tile(begin + start, begin + stop, bias[:, None, edge:].contiguous()))
    return made


def mask(groups: Sequence[Sequence[int]], longest: int) -> Tensor:
    """Who sees whom where the sequences are padded on the right to `longest`: groups × 1 × longest × longest."""
    places = torch.arange(longest)
    return torch.stack([_seen(_parts(lengths, longest), places[:, None], places)[None] for lengths in groups])


def _parts(lengths: Sequence[int], total: int = 0) -> Tensor:
    """Of each token: 0 in the prompt, else the number of its answer; up to `total` one part more, which is padding."""
    padding = max(0, total - sum(lengths))
    return torch.arange(len(lengths) + 1).repeat_interleave(torch.tensor([*lengths, padding]))


def _seen(part: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether queries may see keys of the same sequence."""
    return (keys <= queries) & ((part[keys] == 0) | (part[keys] == part[queries]))


def layer(
    module: Any,
    hidden_states: Tensor,
    spans: Sequence[Span] | None = None,
    only: Tensor | None = None,
    before: Sequence[Seen] | None = None,
    keep: dict[int, Seen] | None = None,
    **options: Any,
) -> Any:
    """LlamaAttention's forward, 1 × tokens × width, where there are spans; else its own.

    What comes out is of all positions or `only` of some. Each sees what came `before`, layer by layer, too; `keep`
    takes, by the layer's index, what those after them will see.
    """
    if spans is None:
        return type(module).forward(module, hidden_states, **options)
    by_token = tuple(
        each.view(each.shape[1], -1, module.head_dim)
        for each in lora.project(hidden_states, (module.q_proj, module.k_proj, module.v_proj))
    )
    rotation = tuple(each[0] for each in options["position_embeddings"])
    mixed = _attend(module, by_token, rotation, module.scaling, spans, before, keep)
    mixed = mixed.view(*hidden_states.shape[:-1], -1)
    return module.o_proj(mixed if only is None else mixed.index_select(1, only)), None


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    spans: Sequence[Span] | None = None,
    before: Sequence[Seen] | None = None,
    keep: dict[int, Seen] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: 1 × heads × tokens × width in, 1 × tokens × heads × width out."""
    if spans is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        other: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return other
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    by_token = tuple(each[0].transpose(0, 1) for each in (query, key, value))
    return _attend(module, by_token, (None, None), scale, spans, before, keep)[None], None


def _attend(
    module: Any,
    by_token: tuple[Tensor, ...],
    rotation: tuple[Tensor | None, ...],
    scale: float,
    spans: Sequence[Span],
    before: Sequence[Seen] | None,
    keep: dict[int, Seen] | None,
) -> Tensor:
    """Of queries, keys and values, tokens × heads × width each: tokens × heads × width."""
    heads = by_token[1].shape[1]
    turns = (rotation, rotation, (None, None))
    query, key, value = (_LaidOut.apply(x, heads, *turn) for x, turn in zip(by_token, turns, strict=True))  # type: ignore[no-untyped-call]
    if keep is not None:
        keep[module.layer_idx] = key, value
    old = (None, None) if before is None else before[module.layer_idx]
    result: Tensor = _Attention.apply(query, key, value, *old, scale, spans)  # type: ignore[no-untyped-call]
    return result


def _laid_out(x: Tensor, heads: int, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Tokens × heads of queries × width → key heads × (tokens · queries a key head) × width, tokens first; rotated."""
    tokens, count, width = x.shape
    result = x.new_empty(heads, tokens, count // heads, width)
    by_token = result.transpose(0, 1)
    _turn(x.reshape(by_token.shape), by_token, cos, sin)
    return result.view(heads, -1, width)


def _by_token(x: Tensor, tokens: int, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """The way back from `_laid_out`, as its gradient: what was rotated is turned back."""
    heads, _, width = x.shape
    result = x.new_empty(tokens, heads, x.shape[1] // tokens, width)
    _turn(x.view(heads, tokens, -1, width).transpose(0, 1), result, cos, sin, back=True)
    return result.view(tokens, -1, width)


def _turn(x: Tensor, result: Tensor, cos: Tensor | None, sin: Tensor | None, back: bool = False) -> None:
    """Write x to `result`, both tokens × … × width, rotated by angles of which cos and sin are tokens × width.

    A pair of numbers is one of the first half and its fellow of the second. `back` is the transpose of that.
    """
    if cos is None or sin is None:
        result.copy_(x)
        return
    (x1, x2), (y1, y2) = x.chunk(2, -1), result.chunk(2, -1)
    cos1, cos2 = cos[:, None, None].chunk(2, -1)
    sin1, sin2 = sin[:, None, None].chunk(2, -1)
    torch.mul(x1, cos1, out=y1).addcmul_(x2, sin2 if back else sin1, value=1 if back else -1)
    torch.mul(x2, cos2, out=y2).addcmul_(x1, sin1 if back else sin2, value=-1 if back else 1)


def _probabilities(query: Tensor, key: Tensor, scale: float, tile: Tile) -> Tensor:
    """Softmax of a tile's scores, key heads × (queries · repeat) × keys, in room 0."""
    scores = _product(query, key.transpose(1, 2), 0, scale)
    if count := tile.bias.shape[-1]:
        by_query = scores.view(len(scores), tile.stop - tile.start, -1, scores.shape[-1])
        by_query[..., -count:].add_(tile.bias)
    return torch.softmax(scores, -1, out=scores)


class _LaidOut(torch.autograd.Function):
    """`_laid_out`, and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.tokens = len(x)
        return _laid_out(x, heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _by_token(outputs[0], ctx.tokens, *ctx.saved_tensors), None, None, None


class _Attention(torch.autograd.Function):
    """Queries, keys and values as laid out, and keys and values that came before all of them → tokens × heads × width.

    Keys and values are key heads × tokens × width.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        old_key: Tensor | None,
        old_value: Tensor | None,
        scale: float,
        spans: Sequence[Span],
    ) -> Tensor:
        heads, tokens, _ = key.shape
        repeat = query.shape[1] // tokens
        result = query.new_empty(tokens, heads, repeat, value.shape[-1])
        for span in spans:
            keys, values = _of(span, key, old_key), _of(span, value, old_value)
            for tile in span.tiles:
                queries, count = query[:, tile.start * repeat : tile.stop * repeat], _count(tile, span, keys)
                weights = _probabilities(queries, keys[:, :count], scale, tile)
                mixed = _product(weights, values[:, :count], 1)
                result[tile.start : tile.stop] = mixed.view(heads, tile.stop - tile.start, repeat, -1).transpose(0, 1)
        ctx.save_for_backward(query, key, value, old_key, old_value)
        ctx.scale, ctx.spans = scale, spans
        return result.view(tokens, heads * repeat, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, old_key, old_value = ctx.saved_tensors
        heads, tokens, _ = key.shape
        repeat = query.shape[1] // tokens
        slopes = _laid_out(outputs[0], heads)
        d_query, d_key, d_value = (torch.empty_like(each) for each in (query, key, value))
        d_olds = [None if each is None else _zeros(each) for each in (old_key, old_value)]
        for span in ctx.spans:
            keys, values = _of(span, key, old_key), _of(span, value, old_value)
            d_keys, d_values = _zeros(keys), _zeros(values)
            for tile in span.tiles:
                here, count = slice(tile.start * repeat, tile.stop * repeat), _count(tile, span, keys)
                asked, slope = query[:, here].contiguous(), slopes[:, here].contiguous()
                seen = keys[:, :count].contiguous()
                weights = _probabilities(asked, seen, ctx.scale, tile)
                d_values[:, :count].add_(_product(weights.transpose(1, 2), slope, 2))
                d_weights = _product(slope, values[:, :count].transpose(1, 2), 1)
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype, grad_input=d_weights)
                d_query[:, here] = _product(d_scores, seen, 2, ctx.scale)
                d_keys[:, :count].add_(_product(d_scores.transpose(1, 2), asked, 2, ctx.scale))
            for d_own, d_old, found in ((d_key, d_olds[0], d_keys), (d_value, d_olds[1], d_values)):
                d_own[:, span.start : span.stop] = found[:, span.start - span.stop :]
                if d_old is not None:
                    d_old += found[:, : span.start - span.stop]
        back = [None if each is None else each.to(key.dtype) for each in d_olds]
        return d_query, d_key, d_value, *back, None, None


def _of(span: Span, own: Tensor, old: Tensor | None) -> Tensor:
    """The keys, or values, that a span's queries may see: the old ones and the span's own."""
    seen = own[:, span.start : span.stop]
    return seen if old is None else torch.cat([old, seen], 1)


def _count(tile: Tile, span: Span, keys: Tensor) -> int:
    """How many of its span's keys a tile's queries see."""
    return keys.shape[1] - (span.stop - tile.stop)


def _zeros(x: Tensor) -> Tensor:
    """For sums: in fp32, or in fp64."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)


def _product(a: Tensor, b: Tensor, number: int, scale: float = 1.0) -> Tensor:
    """scale · a @ b, in the room of this number."""
    place = room(number, (len(a), a.shape[1], b.shape[2]), a.dtype)
    return torch.baddbmm(place, a, b, beta=0, alpha=scale, out=place)
