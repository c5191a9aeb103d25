"""Run by test_kills.py on some ranks: a training that dies at a point of writing a checkpoint.

    python ranks_killed_writing.py RANK POINT RECIPE [OPTION …]

POINT counts the calls that change the disk, from 0, which rank RANK makes in its checkpoints' code
in the second checkpoint of the run: it kills itself *before* that call. With a POINT beyond the
last, the run ends in peace and rank RANK says how many there were.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convnext_yolo.launch.cli import main
from convnext_yolo.recipes import checkpoint_writer, retention

THE_SECOND = 2


class Points:
    """Counts calls, and dies before one."""

    def __init__(self, fatal: int):
        self.fatal, self.count, self.checkpoint = fatal, 0, 0

    def watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if self.checkpoint == THE_SECOND:
                if self.count == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.count += 1
            return call(*arguments, **options)

        return watched

    def begin(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def begun(*arguments: Any, **options: Any) -> Any:
            self.checkpoint += 1
            return call(*arguments, **options)

        return begun


def install(points: Points) -> None:
    """All that the writer changes a disk with; the plain names are looked up at each call."""
    writer: Any = checkpoint_writer
    for name in ("save_file", "sync_folder", "write_synced"):
        setattr(writer, name, points.watch(getattr(writer, name)))
    for name in ("sync_folder", "write_synced"):
        setattr(retention, name, points.watch(getattr(retention, name)))
    os.fsync = points.watch(os.fsync)
    shutil.rmtree = points.watch(shutil.rmtree)  # type: ignore[assignment]
    for name in ("rename", "replace", "mkdir"):
        setattr(Path, name, points.watch(getattr(Path, name)))
    kind: Any = writer.CheckpointWriter
    kind.begin = points.begin(kind.begin)


if __name__ == "__main__":
    rank, fatal, recipe, *options = sys.argv[1:]
    mine = os.environ["RANK"] == rank
    points = Points(int(fatal))
    if mine:
        install(points)
    checkpoint_writer.PART_BYTES = 2**20  # or one part would hold all, and rank 0 write it
    code = main(["train", "--config", recipe, *options])
    if mine:
        print(f"points: {points.count}", flush=True)
    sys.exit(code)
