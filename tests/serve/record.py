"""Record what a real vLLM answers to `tests/shapes.py`, with and without what the gateway injects.

    python -m tests.serve.record URL SERVED_NAME

Writes `recorded/<shape>.plain` (the client's request as it is) and `.full` (as the gateway forwards it). Run it again
for a new release of vLLM; a difference in the files shows what changed on the wire.
"""

import sys
from pathlib import Path

import httpx

from serve.injection import inject
from tests.serving import normalised
from tests.shapes import CHAT, SHAPES

RECORDED = Path(__file__).parent / "recorded"


def record(url: str, name: str) -> None:
    """Ask everything twice and write it down."""
    with httpx.Client(base_url=url, timeout=120) as client:
        for shape, (path, request) in SHAPES.items():
            forwarded, _ = inject("chat.completions" if path == CHAT else "completions", request, name)
            for suffix, body in {"plain": {**request, "model": name}, "full": forwarded}.items():
                answer = client.post(path, json=body).raise_for_status()
                content = answer.content.replace(f'"model":"{name}"'.encode(), b'"model":"policy@base"')
                (RECORDED / f"{shape}.{suffix}").write_bytes(normalised(content))


if __name__ == "__main__":
    record(*sys.argv[1:])
