"""Where this rank is, for whoever watches it from outside.

A rank that hangs in a collective, a driver or a file system can't tell of itself. So whatever it
begins it notes in a few bytes of memory that it shares with the guard beside it
(`launch/supervision/guard.py`), and on SIGUSR2 it prints the stacks of its threads, wherever it
hangs. Without a guard nothing happens.
"""

import faulthandler
import functools
import os
import signal
import tempfile
import time
from dataclasses import dataclass

# The number of the open file that both share, in the environment of a rank.
HEARTBEAT = "CONVNEXT_YOLO_HEARTBEAT"
SHOW_STACKS = signal.SIGUSR2
START = "start"  # what a rank does until it heeds signals
_BYTES = 64


@dataclass(frozen=True)
class Beat:
    """What a rank does. Of ranks that do the same, the one with the lower count is behind."""

    count: int = 0  # of the things that it has begun; 0: no step yet
    step: int = 0
    doing: str = START
    since_s: float = 0.0  # time.monotonic(), which processes of a host share


class Heartbeat:
    """A rank's side. Every rank of a run calls it at the same places."""

    def __init__(self) -> None:
        self.step, self._count = 0, 0
        self._file = os.environ.get(HEARTBEAT)
        if self._file:
            faulthandler.register(SHOW_STACKS)

    def beat(self, doing: str) -> None:
        """Notes what begins now: a word."""
        if self._file:
            self._count += 1
            text = f"{self._count} {self.step} {doing} {time.monotonic():.3f}"
            os.pwrite(int(self._file), text.ljust(_BYTES).encode(), 0)


@functools.cache
def heartbeat() -> Heartbeat:
    """The one of this process."""
    return Heartbeat()


def create() -> int:
    """The shared memory of a rank that is to be started, as an open file."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("heartbeat")
    # Pythons that were built for old systems (before glibc 2.27) lack it: a file without a name.
    file, name = tempfile.mkstemp()
    os.unlink(name)
    return file


def read(file: int) -> Beat | None:
    """What a rank has noted last; None before it has."""
    words = os.pread(file, _BYTES, 0).decode(errors="replace").split()
    if len(words) != 4:
        return None
    return Beat(int(words[0]), int(words[1]), words[2], float(words[3]))
