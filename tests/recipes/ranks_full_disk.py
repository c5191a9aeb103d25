"""Run by test_full_disk.py on some ranks: a training for which the disk is full for a while.

    python ranks_full_disk.py FIRST LAST RECIPE [OPTION …]

While checkpoints number FIRST to LAST (from 1) are written, no file may become larger than a few
KiB, on any rank: the system itself refuses to write on, as it does on a full disk.
"""

import resource
import signal
import sys
from pathlib import Path
from typing import Any

from convnext_yolo.launch.cli import main
from convnext_yolo.recipes import checkpoint_writer

SMALL_BYTES = 2**14


def install(first: int, last: int) -> None:
    kind: Any = checkpoint_writer.CheckpointWriter
    begin, finish = kind.begin, kind.finish
    begun = 0

    def limited_begin(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal begun
        begun += 1
        if first <= begun <= last:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_BYTES, resource.RLIM_INFINITY))
        begin(self, *arguments, **options)

    def limited_finish(self: Any) -> Path:
        try:
            return Path(finish(self))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    kind.begin, kind.finish = limited_begin, limited_finish


if __name__ == "__main__":
    first, last, recipe, *options = sys.argv[1:]
    install(int(first), int(last))
    sys.exit(main(["train", "--config", recipe, *options]))
