"""A checkpoint is whole or absent, and an old one never comes back."""

from pathlib import Path

import pytest
import torch

from learner.checkpoint import Checkpoint, Checkpoints, Cursor
from learner.examples import Pair, Thumb


def made(updates: int) -> Checkpoint:
    cursor = Cursor("v3", updates, 1, 2, 0, tuple(f"f{i}" for i in range(updates)), "r1")
    trainer = {"optimizer": {"state": {}, "step": updates}, "algorithm": {"beta": 0.1}}
    return Checkpoint(cursor, {"w": torch.full((2,), float(updates))}, trainer, torch.zeros(4))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    for updates in (1, 2):
        checkpoints.save(made(updates))
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None
    assert loaded.cursor == made(2).cursor
    assert loaded.weights["w"].tolist() == [2, 2]
    assert loaded.trainer == {"optimizer": {"state": {}, "step": 2}, "algorithm": {"beta": 0.1}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["2"]


@pytest.mark.parametrize("crash_at", ["os.rename", "torch.save", "learner.checkpoint.sync"])
def test_a_save_that_does_not_end_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(made(1))
    monkeypatch.setattr(crash_at, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(made(2))
    monkeypatch.undo()
    again = Checkpoints(tmp_path)
    loaded = again.load()
    assert loaded is not None
    assert loaded.cursor.updates == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]
    again.save(made(2))


def test_a_cursor_counts_thumbs_and_pairs_and_what_was_spent_with_them() -> None:
    thumbs = [Thumb("f1", [2], [3], True, []), Thumb("f2", [2], [4], False, [])]
    pairs = [Pair(("f3", "f4"), [2], [3], [4], "votes"), Pair(("f5",), [2], [5], [4], "correction")]
    cursor = Cursor("v3").after(thumbs).after(pairs)
    assert cursor == Cursor("v3", 2, 1, 1, 2, ("f1", "f2", "f3", "f4", "f5"))


def test_a_clear_that_does_not_end_never_brings_an_older_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(made(1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_remove", lambda below: None)  # killed before the first was removed
        checkpoints.save(made(2))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda place: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.clear()
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded.cursor.updates == 2
    checkpoints.clear()
    assert checkpoints.load() is None
