import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from thumbwheel.errors import AdapterError
from thumbwheel.manifest import KLBound, LearnedFrom, Manifest
from thumbwheel.store import CONFIG, MARKER, WEIGHTS, AdapterStore, fingerprint, number


def manifest(version: str = "v1") -> Manifest:
    return Manifest(
        version=version,
        base_model="sha256:0",
        created=1.0,
        algorithm="kto",
        learned_from=LearnedFrom(ups=1, downs=1, feedback_ids=["a", "b"]),
        kl=KLBound(mean=0.1, upper=0.2, per_token=0.01, n=8, budget=4.0),
        probes=[],
    )


def save(directory: Path, **config: object) -> None:
    (directory / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "bias": "none"} | config))
    save_file({"lora_A": np.ones((8, 16), np.float32)}, directory / WEIGHTS)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def test_a_version_comes_back_as_it_was_written(store: AdapterStore) -> None:
    written = store.write("v1", manifest(), save)
    assert store.verify("v1", written.digest) == written
    assert store.versions() == ["v1"]
    assert written.path.is_absolute()


def test_the_digest_covers_every_byte_of_every_file(store: AdapterStore) -> None:
    adapter = store.write("v1", manifest(), save)
    for name in (CONFIG, WEIGHTS, "manifest.json"):
        path = adapter.path / name
        before = path.read_bytes()
        path.write_bytes(before.replace(b"8", b"9", 1) if name != WEIGHTS else before[:-1] + b"\x01")
        with pytest.raises(AdapterError, match="fails its digest"):
            store.verify("v1")
        path.write_bytes(before)
    store.verify("v1")
    with pytest.raises(AdapterError, match="fails its digest"):
        store.verify("v1", "sha256:other")


def test_a_name_is_never_written_twice(store: AdapterStore) -> None:
    store.write("v1", manifest(), save)
    with pytest.raises(AdapterError, match="never reused"):
        store.write("v1", manifest(), save)


def test_a_version_without_its_marker_is_not_there(store: AdapterStore) -> None:
    adapter = store.write("v1", manifest(), save)
    (adapter.path / MARKER).unlink()
    assert store.versions() == []
    with pytest.raises(AdapterError, match="not whole"):
        store.open("v1")
    assert store.next_version() == "v2"


def test_a_crash_while_writing_leaves_no_version_and_its_number_is_passed_over(store: AdapterStore) -> None:
    def crash(directory: Path) -> None:
        save(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write("v1", manifest(), crash)
    assert store.versions() == []
    assert list(store.root.iterdir()) == []


def test_the_next_name_is_above_the_store_and_above_the_log(store: AdapterStore) -> None:
    assert store.next_version() == "v1"
    store.write("v9", manifest("v9"), save)
    store.write("v10", manifest("v10"), save)
    assert store.versions() == ["v9", "v10"]
    assert store.next_version() == "v11"
    assert store.next_version(floor=20) == "v21"
    assert number("base") == 0


def test_truncated_weights_are_seen_from_their_header(store: AdapterStore) -> None:
    adapter = store.write("v1", manifest(), save)
    weights = adapter.path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="truncated"):
        store.verify("v1")


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 10**9) + b"{}", struct.pack("<Q", 2) + b"{}"])
def test_weights_that_are_no_safetensors_are_refused(store: AdapterStore, content: bytes) -> None:
    def broken(directory: Path) -> None:
        save(directory)
        (directory / WEIGHTS).write_bytes(content)

    with pytest.raises(AdapterError, match=WEIGHTS):
        store.write("v1", manifest(), broken)
    assert store.versions() == []


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_format_that_runs_code_is_refused(store: AdapterStore, name: str) -> None:
    def pickled(directory: Path) -> None:
        save(directory)
        (directory / name).write_bytes(b"\x80\x04.")

    with pytest.raises(AdapterError, match="runs code"):
        store.write("v1", manifest(), pickled)
    adapter = store.write("v2", manifest("v2"), save)
    (adapter.path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="runs code"):
        store.verify("v2")


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"r": 1024}, {"peft_type": "IA3"}]
)
def test_what_the_engine_cannot_serve_is_refused(store: AdapterStore, config: dict[str, object]) -> None:
    with pytest.raises(AdapterError, match=CONFIG):
        store.write("v1", manifest(), lambda directory: save(directory, **config))


@pytest.mark.parametrize("version", ["v2", "../v1", "base", ""])
def test_a_version_that_is_not_there_is_named(store: AdapterStore, version: str) -> None:
    store.write("v1", manifest(), save)
    with pytest.raises(AdapterError, match="no adapter version"):
        store.open(version)


def test_a_model_is_told_from_another_by_its_weights_and_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    save_file({"w": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    second = fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    assert len({first, second, fingerprint(tmp_path)}) == 3
    with pytest.raises(AdapterError, match="cannot read the base model"):
        fingerprint(tmp_path / "absent")
