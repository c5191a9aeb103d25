"""TensorBoard: event files in RUN/tensorboard, one of each session.

TensorBoard itself leaves out the steps that a later session says it repeats.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .config import Recipe
from .trackers import Key, Record, columns, numbers


def load(recipe: Recipe) -> None:
    """Imports all that is going to be needed; raises ImportError."""
    import torch.utils.tensorboard  # noqa: F401

    Image.preinit()


class TensorBoard:
    """A writer of event files, see `Backend`."""

    def __init__(self, recipe: Recipe, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        log_folder = folder / "tensorboard"
        self.was_there = any(log_folder.glob("events.*"))
        # Of events from that step on only this session's count.
        self.writer = SummaryWriter(str(log_folder), purge_step=step + 1 if step else 0)
        self._text("recipe", f"```yaml\n{recipe.to_yaml()}```", step)

    def held(self, records: Sequence[Record]) -> set[Key]:
        # Each event is flushed when it is written, so a session lacks none of its own.
        return {(r["kind"], r["step"]) for r in records} if self.was_there else set()

    def log(self, record: Record) -> None:
        for name, number in numbers(record).items():
            self.writer.add_scalar(name, number, record["step"])
        self.writer.flush()

    def table(self, name: str, rows: Sequence[Record], step: int) -> None:
        head = columns(rows)
        lines = [head, ["---"] * len(head), *([row[c] for c in head] for row in rows)]
        self._text(name, "\n".join(" | ".join(map(str, cells)) for cells in lines), step)

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()

    def artifact(self, path: Path) -> None:
        self._text("weights", str(path), 0)  # it keeps no files

    def close(self) -> None:
        self.writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, text, step)
        self.writer.flush()
