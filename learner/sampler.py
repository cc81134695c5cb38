"""Sampling from the policy as it is in memory: batched, with a key-value cache, at temperature 1, nothing cut off."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from learner.logprobs import Row, log_softmax


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    stop: frozenset[int],
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """One completion a prompt, in their order: it ends with a token of `stop` or after `max_tokens`.

    All prompts run as one batch, from which rows that have ended are dropped once they are a quarter of it. A prompt
    that is there several times is read once. `progress` is called after each step, with 1.
    """
    from transformers import DynamicCache

    head = model.get_output_embeddings()
    cache = DynamicCache(config=model.config)
    places: dict[tuple[int, ...], int] = {}
    copies = torch.tensor([places.setdefault(tuple(prompt), len(places)) for prompt in prompts], device=model.device)
    longest = max(len(prompt) for prompt in places)
    # Padded on the left, so that the next token is the last column for every row.
    ids = torch.tensor([[0] * (longest - len(p)) + [*p] for p in places], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in places], device=model.device)

    def read() -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        states: Tensor = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return states[:, -1]

    states, mask = read()[copies], mask[copies]
    cache.batch_select_indices(copies)
    alive = torch.arange(len(prompts))  # which prompt each row of the batch belongs to
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    completions: list[list[int]] = [[] for _ in prompts]
    stops = torch.tensor(sorted(stop))
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # on a CPU a step of one token takes two thirds of the time it does in sdpa
    try:
        while True:
            tokens = _draw(log_softmax(head, states).exp_(), generator)
            for row, (owner, token) in enumerate(zip(alive.tolist(), tokens.tolist(), strict=True)):
                if not ended[row]:
                    completions[owner].append(token)
            ended |= torch.isin(tokens.cpu(), stops)
            progress(1)
            if ended.all() or max(len(completion) for completion in completions) == max_tokens:
                break
            if ended.float().mean() >= 0.25:
                keep = (~ended).nonzero().squeeze(-1)
                cache.batch_select_indices(keep.to(model.device))
                alive, ended, tokens, mask = alive[keep], ended[keep], tokens[keep], mask[keep]
            ids = tokens[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            states = read()
    finally:
        model.set_attn_implementation(attention)
    return [Row(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row by the inverse of the distribution function: a random number a row, not one a token."""
    upto = probabilities.cumsum(-1)
    point = torch.rand(len(upto), 1, generator=generator).to(upto) * upto[:, -1:]
    return torch.searchsorted(upto, point, right=True).squeeze(-1).clamp(max=upto.shape[-1] - 1)
