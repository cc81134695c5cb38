"""Attention by tiles is attention: every row sees what it would see alone, forward and backward."""

from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from learner import attention
from tests.learner.conftest import tiny

LAYOUTS = {
    "one row": [[5]],
    "one token": [[1]],
    "short rows share a tile": [[2, 1], [1, 3], [4]],
    "a row of many tiles": [[9, 8]],
    "long beside short": [[2, 2], [11, 7], [1], [3, 1]],
    "a prompt with answers": [[5, 3, 2, 4]],
    "answers over tiles": [[3, 2], [6, 7, 5], [2, 1, 1]],
}


def plain(query: Tensor, key: Tensor, value: Tensor, layout: list[list[int]]) -> Tensor:
    """Each answer read alone after its prompt, with repeated keys, by torch's own kernel."""
    repeat = len(query) // len(key)
    result = torch.zeros(query.shape[1], len(query), value.shape[-1], dtype=query.dtype)
    begin = 0
    for lengths in layout:
        ends = list(accumulate(lengths, initial=begin))
        prompt = list(range(ends[0], ends[1]))
        for start, stop in list(pairwise(ends))[1:] or [(ends[1], ends[1])]:
            row = prompt + list(range(start, stop))
            q, k, v = (
                query[:, row],
                key[:, row].repeat_interleave(repeat, 0),
                value[:, row].repeat_interleave(repeat, 0),
            )
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(0, 1)
            fresh = row if start == ends[1] else row[len(prompt) :]
            result = result.index_copy(0, torch.tensor(fresh), out[len(row) - len(fresh) :])
        begin = ends[-1]
    return result


@pytest.mark.parametrize("tile", [1, 4, 7, 128])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("repeat", [1, 3])
def test_every_row_sees_what_it_would_see_alone(
    monkeypatch: pytest.MonkeyPatch, repeat: int, layout: list[list[int]], tile: int
) -> None:
    monkeypatch.setattr(attention, "TILE", tile)
    torch.manual_seed(0)
    tokens = sum(map(sum, layout))
    query, key, value, slope = (
        torch.randn(heads, tokens, width, dtype=torch.float64)
        for heads, width in ((2 * repeat, 4), (2, 4), (2, 6), (tokens, 0))
    )
    slope = torch.randn(tokens, 2 * repeat, 6, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (query, key, value)]
    made, _ = attention.attention(
        None, query[None], key[None], value[None], None, scaling=0.3, spans=attention.spans(layout)
    )
    expected = plain(query, key, value, layout)
    torch.testing.assert_close(made[0], expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((made[0] * slope).sum(), inputs)
    for gradient, other in zip(ours, torch.autograd.grad((expected * slope).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tile", [4, 128])
def test_a_layer_of_llamas_is_transformers_own_row_by_row(
    monkeypatch: pytest.MonkeyPatch, tile: int, frozen: bool
) -> None:
    """Rotation of queries and keys included, forward and gradient, to the input and to weights that are trained."""
    monkeypatch.setattr(attention, "TILE", tile)
    model, other = (tiny(torch.float64).requires_grad_(not frozen) for _ in range(2))
    attention.install(model)
    lengths = [[3, 2], [9], [1]]
    torch.manual_seed(0)
    states = torch.randn(1, 15, model.config.hidden_size, dtype=torch.float64)
    ours, theirs = (each.base_model.layers[0].self_attn for each in (model, other))
    assert "forward" in vars(ours)
    found = []
    for module, rows in ((ours, [15]), (theirs, [5, 9, 1])):
        given = states.clone().requires_grad_()
        outputs = []
        places = [torch.arange(5), torch.arange(9), torch.arange(1)]
        parts = [torch.cat(places)] if module is ours else places
        options = {"spans": attention.spans(lengths, torch.float64)} if module is ours else {}
        for part, place in zip(torch.split(given, rows, 1), parts, strict=True):
            angles = tuple(each.double() for each in other.base_model.rotary_emb(part, place[None]))
            outputs.append(module(part, position_embeddings=angles, attention_mask=None, **options)[0])
        mixed = torch.cat(outputs, 1)
        slope = torch.linspace(-1, 1, mixed.numel(), dtype=torch.float64).view_as(mixed)
        trained = [] if frozen else list(module.parameters())
        found.append([mixed, *torch.autograd.grad((mixed * slope).sum(), [given, *trained])])
    for mine, their in zip(*found, strict=True):
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-12)


def test_what_is_rotated_and_turned_back_is_what_it_was() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(7, 6, 8, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    cos, sin = (torch.cat([each, each], -1) for each in (angle.cos(), angle.sin()))
    turned = attention._laid_out(x, 2, cos, sin)
    assert turned.shape == (2, 21, 8)
    assert not torch.allclose(turned, attention._laid_out(x, 2))
    torch.testing.assert_close(attention._by_token(turned, 7, cos, sin), x)


def test_no_tile_is_longer_than_it_may_be_and_each_token_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE", 4)
    made = attention.spans([[2, 2], [11, 7], [1], [3, 1]])
    assert [(span.start, span.stop) for span in made] == [(0, 4), (4, 22), (22, 23), (23, 27)]
    for span in made:
        assert [i for tile in span.tiles for i in range(tile.start, tile.stop)] == list(range(span.start, span.stop))
        assert max(tile.stop - tile.start for tile in span.tiles) <= 4


def test_what_is_added_to_scores_is_as_wide_as_products_are_fast_and_no_wider_than_the_keys() -> None:
    (long,), (short,) = (attention.spans([[prompt, 1]], known=23) for prompt in (300, 3))
    assert [tile.bias.shape[-1] for tile in long.tiles] == [121, 128, 64]  # the first has no more keys
    assert [tile.bias.shape[-1] for tile in short.tiles] == [4]


def test_the_mask_of_padded_sequences_is_who_sees_whom() -> None:
    seen = attention.mask([[2, 1, 2], [1, 1]], longest=6)
    assert seen.shape == (2, 1, 6, 6)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert seen.any(-1).all(), "a position that sees nothing has no softmax"


def test_a_call_without_tiles_is_transformers_own() -> None:
    model, other = tiny(), tiny()
    attention.install(model)
    assert model.config._attn_implementation == attention.NAME
    ids = torch.tensor([[2, 3, 4, 5], [6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(model(ids, attention_mask=mask).logits, other(ids, attention_mask=mask).logits)


def test_a_model_that_attends_otherwise_keeps_its_attention() -> None:
    def model(stateful: bool = False, backend: bool = True, **config: object) -> SimpleNamespace:
        return SimpleNamespace(
            config=SimpleNamespace(**config), _is_stateful=stateful, _supports_attention_backend=backend
        )

    assert attention.covers(tiny())
    assert attention.covers(model(layer_types=["full_attention"] * 2, sliding_window=4096))
    assert not attention.covers(model(layer_types=["full_attention", "sliding_attention"]))
    assert not attention.covers(model(sliding_window=4096))
    assert not attention.covers(model(attn_logit_softcapping=50.0))
    assert not attention.covers(model(stateful=True))
    assert not attention.covers(model(backend=False))
