"""What training has reached, on disk: weights, the trainer's and the random state, the cursor of what was learned.

    checkpoints/7/state.pt      tensors (read back with `weights_only`: nothing in it is run)
                  cursor.json   which votes these weights have learned from
                  COMPLETE      its presence says that the checkpoint is whole

They land together, by one rename: weights without their cursor, or a cursor without its weights, cannot be. There is
one checkpoint, of the cycle in progress; none means that the next cycle starts from the champion.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.examples import Examples, Pair, Thumb, spent
from thumbwheel.events import BASE
from thumbwheel.store import sync

STATE = "state.pt"
CURSOR = "cursor.json"
MARKER = "COMPLETE"


@dataclass(frozen=True, slots=True)
class Cursor:
    """What the working weights are: `parent` and the votes learned since, in order.

    `reward` is the reward model that scored fresh answers, where there was one.
    """

    parent: str = BASE
    updates: int = 0
    ups: int = 0
    downs: int = 0
    pairs: int = 0
    feedback_ids: tuple[str, ...] = ()
    reward: str = ""

    def after(self, examples: Examples) -> "Cursor":
        """The cursor after one more update from these."""
        ups = sum(isinstance(example, Thumb) and example.up for example in examples)
        pairs = sum(isinstance(example, Pair) for example in examples)
        return replace(
            self,
            updates=self.updates + 1,
            ups=self.ups + ups,
            downs=self.downs + len(examples) - pairs - ups,
            pairs=self.pairs + pairs,
            feedback_ids=(*self.feedback_ids, *spent(examples)),
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that is needed to go on as if nothing had happened."""

    cursor: Cursor
    weights: dict[str, Tensor]
    trainer: dict[str, Any]
    random: Tensor


class Checkpoints:
    """A directory with the checkpoint in it. One process at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".*"):
            shutil.rmtree(leftover)

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; whole or not at all, and durable on return."""
        number = max(self._numbers(), default=0) + 1
        scratch = Path(tempfile.mkdtemp(prefix=".", dir=self._root))
        with open(scratch / STATE, "wb") as file:
            torch.save({name: getattr(checkpoint, name) for name in ("weights", "trainer", "random")}, file)
        (scratch / CURSOR).write_text(json.dumps(asdict(checkpoint.cursor)))
        (scratch / MARKER).touch()
        for path in (scratch / STATE, scratch / CURSOR, scratch / MARKER, scratch):
            sync(path)
        os.rename(scratch, self._root / str(number))
        sync(self._root)
        self._remove(below=number)

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint; None where there is none."""
        whole = [number for number in self._numbers() if (self._root / str(number) / MARKER).is_file()]
        if not whole:
            return None
        place = self._root / str(max(whole))
        self._remove(below=max(whole))
        cursor = json.loads((place / CURSOR).read_text())
        state = torch.load(place / STATE, weights_only=True)
        return Checkpoint(Cursor(**{**cursor, "feedback_ids": tuple(cursor["feedback_ids"])}), **state)

    def clear(self) -> None:
        """The cycle is over. Oldest first, and the marker before the rest: no older state can come back."""
        self._remove(below=max(self._numbers(), default=0) + 1)

    def _numbers(self) -> list[int]:
        return sorted(int(entry.name) for entry in self._root.iterdir() if entry.name.isdigit())

    def _remove(self, below: int) -> None:
        for number in self._numbers():
            if number < below:
                place = self._root / str(number)
                (place / MARKER).unlink(missing_ok=True)
                sync(place)
                shutil.rmtree(place)
