"""Held-out prompts to measure KL on: from a file, or set aside from the log."""

import json
from collections.abc import Callable
from pathlib import Path

from learner.admission import one_tenth
from thumbwheel.errors import SettingsError

AT_LEAST = 8
"""Fewer prompts than these bound nothing."""


def read(path: Path, model: Path) -> list[list[int]]:
    """Token ids of a JSONL file of {"messages": [...]}, by the chat template of the model's tokenizer.

    Raises SettingsError where the file cannot be read, a line is not of that form, or there are fewer than `AT_LEAST`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read the prompts to measure KL on ([learner] kl_prompts): {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            messages = json.loads(line)["messages"]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template raises what it likes
            raise SettingsError(
                f'{path} line {number} ([learner] kl_prompts) is no {{"messages": …}}: {error}'
            ) from error
        if ids not in prompts:
            prompts.append(ids)
    if len(prompts) < AT_LEAST:
        raise SettingsError(f"{path} ([learner] kl_prompts) has {len(prompts)} distinct prompts, and needs {AT_LEAST}")
    return prompts


def held_out(prompts: list[list[int]] | None) -> Callable[[list[int]], bool]:
    """Which prompts on the log are not learned from: those of the file, or without one a tenth of all."""
    if prompts is None:
        return one_tenth
    kept = {tuple(prompt) for prompt in prompts}
    return lambda prompt: tuple(prompt) in kept
