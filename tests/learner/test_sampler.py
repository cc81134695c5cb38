"""What is sampled follows the model's own distribution, whatever else is in the batch."""

import torch

from learner.sampler import sample
from tests.learner.conftest import VOCABULARY, tiny

STOP = frozenset([1])


def test_answers_end_with_the_stop_token_or_at_the_limit() -> None:
    prompts = [[2, i] for i in range(2, 32)]
    rows = sample(tiny(), prompts, 12, STOP, torch.Generator().manual_seed(0))
    assert [row.prompt for row in rows] == prompts
    lengths = {len(row.completion) for row in rows}
    assert max(lengths) == 12
    assert len(lengths) > 2
    for row in rows:
        assert 1 not in row.completion[:-1]
        assert len(row.completion) == 12 or row.completion[-1] == 1


def test_tokens_come_as_often_as_the_model_says_in_a_padded_batch() -> None:
    model = tiny()
    short, long = [2, 3], [9, 8, 7, 6, 5, 4, 3, 2]
    with torch.no_grad():
        expected = model(torch.tensor([short])).logits[0, -1].softmax(-1)
    n = 4000
    rows = sample(model, [short] * n + [long], 1, STOP, torch.Generator().manual_seed(0))
    seen = torch.bincount(torch.tensor([row.completion[0] for row in rows[:n]]), minlength=VOCABULARY)
    chi_square = ((seen - n * expected) ** 2 / (n * expected)).sum().item()
    assert chi_square < 70  # 31 degrees of freedom: passed by 1 in 10,000


def test_later_tokens_follow_from_the_cache_as_from_a_full_pass() -> None:
    model = tiny()
    n = 3000
    rows = sample(model, [[2, 3]] * n + [[5] * 9], 3, STOP, torch.Generator().manual_seed(1))
    # The mean log-prob of sampled tokens is minus the entropy, if they were drawn from what the full pass computes.
    drawn, entropies = [], []
    with torch.no_grad():
        for length in {len(row.completion) for row in rows[:n]}:
            ids = torch.tensor([row.prompt + row.completion for row in rows[:n] if len(row.completion) == length])
            full = model(ids).logits[:, 1:-1].log_softmax(-1)
            drawn.append(full.gather(-1, ids[:, 2:, None]).flatten())
            entropies.append(-(full.exp() * full).sum(-1).flatten())
    difference = torch.cat(drawn) + torch.cat(entropies)
    assert abs(difference.mean().item()) < 4 * difference.std().item() / len(difference) ** 0.5


def test_a_prompt_that_comes_several_times_is_read_once() -> None:
    model = tiny()
    read: list[list[list[int]]] = []
    model.base_model.register_forward_pre_hook(
        lambda _, arguments, named: read.append(named["input_ids"].tolist()), with_kwargs=True
    )
    prompts = [[2, 3], [4], [2, 3], [4], [4]]
    rows = sample(model, prompts, 3, STOP, torch.Generator().manual_seed(0))
    assert [row.prompt for row in rows] == prompts
    assert read[0] == [[2, 3], [0, 4]]
    assert len({tuple(row.completion) for row in rows}) > 3, "each has an answer of its own"


def test_a_seed_repeats_itself_and_the_model_is_left_as_it_was() -> None:
    model = tiny()
    before = model.config._attn_implementation
    once, again = (sample(model, [[2, 3], [4]], 6, STOP, torch.Generator().manual_seed(7)) for _ in range(2))
    assert once == again
    assert model.config._attn_implementation == before
