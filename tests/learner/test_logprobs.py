"""Log-probs by blocks of the vocabulary, bucketed and padded, are the plain ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from learner import logprobs
from learner.logprobs import Row, buckets, check_output_layer, completion_hidden, sequence_logprobs
from learner.policy import Policy
from learner.sampler import sample
from tests.learner.conftest import VOCABULARY, tiny
from thumbwheel.errors import SettingsError

ROWS = [
    Row([2, 3], [4, 5, 1]),
    Row([2], [9]),
    Row([6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17]),
    Row([3, 3, 3], [3, 1]),
]


def naive(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """One row, unpadded, every logit, in fp64."""
    logits = model(torch.tensor([row.prompt + row.completion])).logits[0].double().log_softmax(-1)
    return torch.stack([logits[len(row.prompt) - 1 + i, id] for i, id in enumerate(row.completion)]).sum()


@pytest.mark.parametrize("block", [1, 2, 5, VOCABULARY, 256])
def test_by_blocks_and_padded_is_naive(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(logprobs, "BLOCK", block)
    model = tiny(torch.float64)
    expected = torch.stack([naive(model, row) for row in ROWS])
    assert torch.allclose(sequence_logprobs(model, ROWS), expected, atol=1e-10)


def test_the_gradient_is_that_of_the_naive_log_probs(monkeypatch: pytest.MonkeyPatch, exact: Policy) -> None:
    monkeypatch.setattr(logprobs, "BLOCK", 3)
    ours_total = sequence_logprobs(exact.model, ROWS).sum()
    plain_total = torch.stack([naive(exact.model, row) for row in ROWS]).sum()
    gradients = [torch.autograd.grad(total, exact.parameters()) for total in (ours_total, plain_total)]
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain, atol=1e-10)
        assert ours.abs().max() > 0


@pytest.mark.parametrize("block", [7, 4096])
def test_finite_differences_agree(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(logprobs, "BLOCK", block)
    model = tiny(torch.float64)
    hidden = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 2, 3, 4, 31])
    assert torch.autograd.gradcheck(lambda h: logprobs.token_logprobs(model, h, targets), hidden)


def head(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    return SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=weight, bias=bias))


@pytest.mark.parametrize("block", [1, 10, 64])
def test_logits_far_apart_and_a_bias_neither_overflow_nor_vanish(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(logprobs, "BLOCK", block)
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(64, 8), 300 * torch.randn(64), 300 * torch.randn(20, 8)
    targets = torch.randint(64, (20,))
    ours = logprobs.token_logprobs(head(weight, bias), hidden, targets)
    plain = torch.nn.functional.linear(hidden, weight, bias).double().log_softmax(-1).gather(-1, targets[:, None])
    torch.testing.assert_close(ours.double(), plain.squeeze(-1), rtol=1e-5, atol=1e-3)
    assert (ours <= 0).all()
    assert ours.isfinite().all()
    assert ours.min() < -1000


def test_in_bf16_no_token_has_more_than_its_share() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(5000, 64).bfloat16(), torch.randn(30, 64).bfloat16() * 8
    targets = (hidden @ weight.t()).argmax(-1)  # nearly certain: a logit rounded in another way would be over 1
    ours = logprobs.token_logprobs(head(weight), hidden, targets)
    plain = (hidden @ weight.t()).double().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(ours.double(), plain, rtol=0, atol=1e-5)
    assert (ours <= 0).all()


def test_an_id_out_of_the_vocabulary_has_no_log_prob() -> None:
    found = logprobs.token_logprobs(head(torch.randn(9, 4)), torch.randn(3, 4), torch.tensor([-1, 8, 9]))
    assert found.isnan().tolist() == [True, False, True]


def test_prompt_positions_do_not_reach_the_output_layer() -> None:
    assert completion_hidden(tiny(), ROWS).shape == (sum(len(row.completion) for row in ROWS), 16)


def test_no_more_logits_at_once_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "BLOCK", 9)
    seen = []
    plain = logprobs._wide

    def watched(logits: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(logits.shape))
        return plain(logits)

    monkeypatch.setattr(logprobs, "_wide", watched)
    sequence_logprobs(tiny(), ROWS)
    assert [width for _, width in seen] == [9] * (VOCABULARY // 9) + [VOCABULARY % 9]
    assert {rows for rows, _ in seen} == {sum(len(row.completion) for row in ROWS)}


def test_buckets_hold_every_row_once_within_the_limit() -> None:
    rows = [Row([i] * (1 + i % 7), [2] * (1 + i % 5)) for i in range(50)]
    parts = list(buckets(rows, tokens=40))
    assert sorted(i for part in parts for i in part) == list(range(50))
    assert all(len(part) * max(len(rows[i]) for i in part) <= 40 for part in parts)
    assert list(buckets([Row([1] * 50, [2] * 50)], tokens=40)) == [[0]]


SHARED = [
    Row([2, 3], [4, 5, 1]),
    Row([6, 7, 8, 9, 10], [11, 12, 13]),
    Row([2, 3], [9]),
    Row([2], [3, 9]),
    Row([6, 7, 8, 9, 10], [11, 1]),
    Row([2, 3], [4, 5, 1]),
    Row([6, 7, 8, 9, 10], [30, 29, 28, 27, 26, 25]),
]


def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    """transformers' own goes through fp32, by which a sum of two gradients is not the sum of the two any more."""
    scaled: torch.Tensor = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    result: torch.Tensor = scaled * self.weight
    return result


def alone(model: Any, rows: list[Row]) -> torch.Tensor:
    return torch.cat([sequence_logprobs(model, [row]) for row in rows])


@pytest.mark.parametrize("implementation", ["tiles", "sdpa"])
def test_rows_that_share_a_prompt_are_what_they_are_alone(
    exact: Policy, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    exact.model.set_attn_implementation("sdpa")
    expected = alone(exact.model, SHARED)
    plain = torch.autograd.grad((expected * torch.arange(1, 8)).sum(), exact.parameters())
    exact.model.set_attn_implementation(implementation)
    ours = sequence_logprobs(exact.model, SHARED)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((ours * torch.arange(1, 8)).sum(), exact.parameters())
    for mine, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def tokens_read(model: Any, rows: list[Row]) -> int:
    """Padding included, of one forward pass."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    with torch.no_grad():
        completion_hidden(model, rows)
    hook.remove()
    return sum(seen)


def test_a_shared_prompt_is_read_once_where_that_pays(exact: Policy) -> None:
    """Of an answer all but its last token, which predicts nothing."""
    assert tokens_read(exact.model, SHARED) == (2 + 2 + 0 + 2) + (1 + 1) + (5 + 2 + 1 + 5)
    exact.model.set_attn_implementation("sdpa")
    answers = [Row([6, 7, 8, 9, 10], [i, 1]) for i in range(4)]
    assert tokens_read(exact.model, answers) == 5 + 4 * 1
    assert tokens_read(exact.model, SHARED) == 3 * (5 + 2 + 1 + 5)
    short = [Row([2], [i] * 7) for i in range(4)]
    assert tokens_read(exact.model, [*short, Row([3], [4])]) == 5 * 7, "one long sequence pads all the others"


def test_attention_that_is_not_plain_never_shares(exact: Policy) -> None:
    exact.model.set_attn_implementation("eager")
    assert tokens_read(exact.model, [Row([6, 7, 8, 9, 10], [i, 1]) for i in range(4)]) == 4 * 6
    exact.model.set_attn_implementation("sdpa")
    exact.model.config.layer_types = ["full_attention", "sliding_attention"]
    assert tokens_read(exact.model, [Row([6, 7, 8, 9, 10], [i, 1]) for i in range(4)]) == 4 * 6


def test_buckets_keep_a_prompt_together_and_count_it_once() -> None:
    rows = [Row([i % 5] * 10, [2] * 5) for i in range(20)]
    parts = list(buckets(rows, tokens=30))
    assert sorted(sorted(part) for part in parts) == [[i, i + 5, i + 10, i + 15] for i in range(5)]
    parts = list(buckets(rows, tokens=25))  # 10 + 3 · 5
    assert sorted(map(len, parts)) == [1] * 5 + [3] * 5
    assert sorted(i for part in parts for i in part) == list(range(20))


def test_sampling_leaves_the_attention_as_it_was(exact: Policy) -> None:
    sample(exact.model, [[2, 3], [4]], 3, frozenset({1}), torch.Generator().manual_seed(0))
    assert exact.model.config._attn_implementation == "tiles"


def test_bf16_hidden_states_give_fp32_log_probs() -> None:
    assert sequence_logprobs(tiny(torch.bfloat16), ROWS).dtype == torch.float32


def test_a_model_that_alters_its_logits_is_refused() -> None:
    with pytest.raises(SettingsError, match="final_logit_softcapping"):
        check_output_layer(SimpleNamespace(final_logit_softcapping=30.0))
    check_output_layer(SimpleNamespace(final_logit_softcapping=None, logit_scale=1.0))
