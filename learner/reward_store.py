"""Reward models on disk: a directory of immutable versions, as adapters have one.

    rewards/r3/model.safetensors   adapter and head, fp32
               manifest.json       base model, what it was learned from, report, calibration
               COMPLETE            the digest; its presence says that the version is whole

A version is written beside its place and moved there by one rename. The digest is the SHA-256 of the names and SHA-256
sums of the two files; `read` checks it. One process writes.
"""

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from learner.reward import Calibration
from learner.reward_report import FitReport
from thumbwheel.errors import AdapterError
from thumbwheel.store import sync

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
MARKER = "COMPLETE"


class RewardManifest(BaseModel):
    """What a version says of itself. `votes`: how many feedback ids it was made from, held-out ones included."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str = ""
    base_model: str
    created: float
    votes: int
    rank: int
    lora_alpha: float
    target_modules: list[str]
    calibration: Calibration
    report: FitReport
    settings: dict[str, Any] = {}


def versions(root: Path) -> list[str]:
    """The whole versions, oldest first."""
    return [f"r{number}" for number in _numbers(root) if (root / f"r{number}" / MARKER).is_file()]


def write(root: Path, manifest: RewardManifest, weights: dict[str, Tensor]) -> str:
    """Make the next version, whole or not at all, durable on return. Returns its name."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".r*"):
        shutil.rmtree(leftover)
    version = f"r{max(_numbers(root), default=0) + 1}"
    scratch = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=root))
    try:
        scratch.chmod(0o755)
        (scratch / WEIGHTS).write_bytes(save(weights))
        (scratch / MANIFEST).write_text(manifest.model_copy(update={"version": version}).model_dump_json(indent=1))
        (scratch / MARKER).write_text(_digest(scratch) + "\n")
        for path in (scratch / WEIGHTS, scratch / MANIFEST, scratch / MARKER, scratch):
            sync(path)
        os.rename(scratch, root / version)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    sync(root)
    return version


def read(root: Path, version: str = "") -> tuple[RewardManifest, dict[str, Tensor]]:
    """A version, the newest whole one by default, every byte checked against its digest.

    Raises AdapterError where there is none, or it is not what it was when it was written.
    """
    whole = versions(root)
    if not whole or (version and version not in whole):
        raise AdapterError(f"there is no reward model {version or 'yet'} in {root}: it has to be fitted first")
    version = version or whole[-1]
    place = root / version
    try:
        expected, actual = (place / MARKER).read_text().strip(), _digest(place)
        if actual != expected:
            raise AdapterError(
                f"reward model {version} fails its digest: the files are {actual}, expected {expected}. It was altered "
                "after it was written; remove it and fit another"
            )
        manifest = RewardManifest.model_validate_json((place / MANIFEST).read_bytes())
        return manifest, load((place / WEIGHTS).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"reward model {version} in {root} cannot be read: {error}") from error


def _numbers(root: Path) -> list[int]:
    names = os.listdir(root) if root.is_dir() else []
    return sorted(int(name[1:]) for name in names if re.fullmatch(r"r\d+", name))


def _digest(directory: Path) -> str:
    total = hashlib.sha256()
    for name in (WEIGHTS, MANIFEST):
        with open(directory / name, "rb") as file:
            total.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
    return f"sha256:{total.hexdigest()}"
