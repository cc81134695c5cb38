"""Prompts to measure on: by the model's own chat template, or a clear error."""

import json
from pathlib import Path

import pytest

from learner import prompts
from thumbwheel.errors import SettingsError


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(20))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(place)
    (place / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return place


def lines(*contents: str) -> str:
    return "\n".join(json.dumps({"messages": [{"role": "user", "content": content}]}) for content in contents)


def test_prompts_go_through_the_chat_template_once_each(tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines(*(f"w{i}" for i in range(8)), "w0") + "\n\n")
    assert prompts.read(file, tokenizer_dir) == [[1, 3 + i, 2] for i in range(8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines("w1", "w2"), "has 2 distinct prompts, and needs 8"),
        ("not json", "line 1"),
        ('{"prompt": "w1"}', "line 1"),
    ],
)
def test_a_file_that_will_not_do_says_why(tokenizer_dir: Path, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        prompts.read(file, tokenizer_dir)


def test_a_file_that_is_not_there_says_so(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="kl_prompts"):
        prompts.read(tmp_path / "none.jsonl", tokenizer_dir)


def test_the_prompts_of_a_file_are_held_out() -> None:
    held_out = prompts.held_out([[1, 2]])
    assert held_out([1, 2])
    assert not held_out([1, 3])
