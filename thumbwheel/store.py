"""The adapter store: a directory of immutable versions.

    adapters/v12/adapter_config.json         as peft writes it
                 adapter_model.safetensors
                 manifest.json               see `manifest.py`
                 COMPLETE                    the digest; its presence says that the version is whole

A version is written beside its place and moved there by one rename, so it is whole or absent. Names are never reused.
The digest is the SHA-256 of the names and SHA-256 sums of the three files. Nothing but safetensors is accepted: the
other formats run code when they are loaded.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thumbwheel.errors import AdapterError
from thumbwheel.manifest import Manifest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "manifest.json"
MARKER = "COMPLETE"
FILES = (CONFIG, WEIGHTS, MANIFEST)
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can be started with (`--max-lora-rank`)."""


@dataclass(frozen=True)
class Adapter:
    """A version in the store. `verify` says whether it is still what it was when it was written."""

    version: str
    path: Path
    digest: str
    manifest: Manifest


class AdapterStore:
    """Immutable versions in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def versions(self) -> list[str]:
        """The whole versions, oldest first."""
        if not self.root.is_dir():
            return []
        found = [entry.name for entry in self.root.iterdir() if (entry / MARKER).is_file()]
        return sorted((name for name in found if re.fullmatch(r"v\d+", name)), key=number)

    def next_version(self, floor: int = 0) -> str:
        """A name that was never used here, numbered above `floor` (what the log knows of)."""
        numbers = [number(name) for name in os.listdir(self.root)] if self.root.is_dir() else []
        return f"v{max([floor, *numbers]) + 1}"

    def write(self, version: str, manifest: Manifest, save: Callable[[Path], None]) -> Adapter:
        """Make a version. `save` writes the config and the weights into the directory that it is given.

        Raises AdapterError where the name is taken or what was written cannot be served; nothing is left behind then.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        place = self.root / version
        if place.exists():
            raise AdapterError(f"adapter version {version} exists already: versions are immutable and never reused")
        scratch = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=self.root))
        try:
            scratch.chmod(0o755)
            save(scratch)
            (scratch / MANIFEST).write_text(manifest.model_dump_json(indent=1))
            for extra in set(os.listdir(scratch)) - set(FILES):
                if extra.endswith((".bin", ".pt", ".pth", ".pkl")):
                    raise AdapterError(f"{extra} is a format that runs code when it is loaded: save as safetensors")
                (scratch / extra).unlink()
            check_files(scratch)
            digest = digest_of(scratch)
            (scratch / MARKER).write_text(digest + "\n")
            for name in (*FILES, MARKER):
                sync(scratch / name)
            sync(scratch)
            try:
                os.rename(scratch, place)
            except OSError as error:
                raise AdapterError(f"adapter version {version} could not be put in place: {error}") from error
            sync(self.root)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return Adapter(version, place, digest, manifest)

    def open(self, version: str) -> Adapter:
        """Read a version without hashing its weights. Raises AdapterError where it is absent or not whole."""
        place = self.root / version
        if not re.fullmatch(r"v\d+", version) or not place.is_dir():
            raise AdapterError(f"there is no adapter version {version} in {self.root}")
        marker = place / MARKER
        if not marker.is_file():
            raise AdapterError(f"adapter version {version} is not whole: {marker} is missing")
        try:
            manifest = Manifest.model_validate_json((place / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise AdapterError(f"adapter version {version} has no readable manifest: {error}") from error
        return Adapter(version, place, marker.read_text().strip(), manifest)

    def verify(self, version: str, digest: str | None = None) -> Adapter:
        """Open a version and check every byte of it against its digest, and that digest against `digest` if given.

        Raises AdapterError where they differ, or where the files cannot be served.
        """
        adapter = self.open(version)
        check_files(adapter.path)
        actual = digest_of(adapter.path)
        for expected in {adapter.digest, digest or adapter.digest}:
            if actual != expected:
                raise AdapterError(
                    f"adapter version {version} fails its digest: the files are {actual}, expected {expected}. "
                    "It was altered after it was written and must not be served"
                )
        return adapter


def number(version: str) -> int:
    """12 of v12; 0 of anything else, the base model among it."""
    match = re.fullmatch(r"\.?v(\d+)(-.*)?", version)
    return int(match[1]) if match else 0


def digest_of(directory: Path) -> str:
    """`sha256:…` over the names and SHA-256 sums of a version's files."""
    total = hashlib.sha256()
    for name in FILES:
        with open(directory / name, "rb") as file:
            total.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
    return f"sha256:{total.hexdigest()}"


def check_files(directory: Path) -> None:
    """Raise AdapterError unless the directory holds a LoRA adapter that vLLM serves, in safetensors, uncut."""
    for name in sorted(os.listdir(directory)):
        if name.endswith((".bin", ".pt", ".pth", ".pkl")):
            raise AdapterError(f"{directory / name} is a format that runs code when it is loaded: save as safetensors")
    for name in FILES:
        if not (directory / name).is_file():
            raise AdapterError(f"{directory} is no adapter: {name} is missing")
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except ValueError as error:
        raise AdapterError(f"{directory / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{directory / CONFIG}: peft_type must be LORA")
    for field, served in (("use_dora", (None, False)), ("bias", (None, "none")), ("modules_to_save", (None, []))):
        if config.get(field) not in served:
            raise AdapterError(f"{directory / CONFIG}: {field}={config[field]!r} is not served by vLLM")
    rank = config.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= ENGINE_RANKS[-1]:
        raise AdapterError(f"{directory / CONFIG}: rank {rank!r} is not served by vLLM (1 to {ENGINE_RANKS[-1]})")
    _check_safetensors(directory / WEIGHTS)


def _check_safetensors(path: Path) -> None:
    """The header says how long the file is (safetensors format: 8 bytes of length, JSON, data): a cut file is seen."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} is no safetensors file: {error}") from error
    if not tensors:
        raise AdapterError(f"{path} holds no tensors")
    if 8 + length + end != size:
        raise AdapterError(f"{path} is truncated: {size} bytes, its header says {8 + length + end}")


def fingerprint(model: Path) -> str:
    """Tells base models apart: SHA-256 over config, tokenizer, and each weight file's name, size and header.

    A safetensors header names every tensor with its shape and type but not its values, so weights that were only
    re-trained in place are told apart by their first and last megabyte as well.
    """
    total = hashlib.sha256()
    try:
        for path in sorted(model.iterdir()):
            if path.name in ("config.json", "tokenizer.json"):
                total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
            elif path.suffix == ".safetensors":
                size = path.stat().st_size
                with open(path, "rb") as file:
                    ends = hashlib.sha256(file.read(1 << 20))
                    file.seek(max(0, size - (1 << 20)))
                    ends.update(file.read())
                total.update(f"{path.name} {size} {ends.hexdigest()}\n".encode())
    except OSError as error:
        raise AdapterError(f"cannot read the base model at {model} ([engine] model): {error}") from error
    return f"sha256:{total.hexdigest()}"


def sync(path: Path) -> None:
    """Make what is written to a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
