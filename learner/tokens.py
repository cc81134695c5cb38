"""The base model's tokenizer, as far as the learner needs it: what an answer says, and what it would be as tokens."""

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from thumbwheel.errors import SettingsError

logger = logging.getLogger(__name__)

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What makes a tokenizer, as transformers saves it. One of the first three is its vocabulary."""

PROBE = "thumbwheel"
"""An answer that no template would write by itself."""


class Tokens:
    """The tokenizer in the directory of the base model, read when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def load(cls, path: Path) -> "Tokens | None":
        """The tokenizer in this directory, read now; None where there is none. Raises SettingsError."""
        if not any((path / name).is_file() for name in FILES[:3]):
            return None
        tokens = cls(path)
        _ = tokens._turn
        return tokens

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:…` over its files, the chat template among them."""
        total = hashlib.sha256()
        for path in (self._path / name for name in FILES):
            if path.is_file():
                total.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n".encode())
        return f"sha256:{total.hexdigest()}"

    def decode(self, ids: Sequence[int]) -> str:
        """What the ids say, special tokens left out. Raises SettingsError where the tokenizer cannot be read."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode_turn(self, text: str) -> list[int]:
        """What the assistant's whole turn would be as tokens: from the end of the prompt, the end token included.

        What looks like a special token in `text` is text. Empty where the chat template does not say how a turn ends.
        Raises SettingsError where the tokenizer cannot be read.
        """
        if self._turn is None:
            return []
        lead, end = self._turn
        said: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [] if self._special.intersection(said) else [*lead, *said, *end]

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self._path, local_files_only=True)
        except Exception as error:  # the parser of tokenizer.json raises no narrower one
            raise SettingsError(f"cannot read the tokenizer at {self._path} ([engine] model): {error}") from error

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder
        return frozenset((*self._tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)))

    @cached_property
    def _turn(self) -> tuple[list[int], list[int]] | None:
        """What the template puts between its generation prompt and an answer, and after it up to the end token."""
        template = self._tokenizer.apply_chat_template
        asked = [{"role": "user", "content": "?"}]
        answered = [*asked, {"role": "assistant", "content": PROBE}]
        try:
            prompt = template(asked, tokenize=False, add_generation_prompt=True)
            whole = template(answered, tokenize=False)
        except Exception as error:  # a template raises what it likes
            logger.warning("corrections are not learned from: the chat template of [engine] model fails: %s", error)
            return None
        before, found, after = whole.removeprefix(prompt).partition(PROBE)
        end = self._encode(after)
        stop = next((i for i, id in enumerate(end) if id in self._special), None)
        if not whole.startswith(prompt) or not found or stop is None:
            logger.warning(
                "corrections are not learned from: the chat template of [engine] model does not write an answer "
                "behind its generation prompt and a special token behind the answer"
            )
            return None
        return self._encode(before), end[: stop + 1]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
