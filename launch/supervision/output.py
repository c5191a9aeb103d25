"""What a rank says: to its launcher, into its log, and of that the line that tells why it ended."""

import collections
import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b|: error: ")
# What follows is of another thread, or of objects that are cleaned up at the end.
_ASIDE = re.compile(r"^Exception (ignored|in thread) ?")


class Output:
    """A rank's output. Its log is `rank-N.log` in that folder."""

    def __init__(self, folder: Path, rank: int):
        self.last_lines: collections.deque[str] = collections.deque(maxlen=200)
        self._log, self._failed = _open_log(folder, rank), False

    def copy(self, source: IO[bytes], to: int) -> None:
        """Copies until the source ends, to a file descriptor and into the log."""
        line = b""
        while data := os.read(source.fileno(), 65536):
            self._keep(data)
            with contextlib.suppress(OSError):  # where nobody reads it any more, the log goes on
                os.write(to, data)
            *lines, line = (line + data).split(b"\n")
            self.last_lines.extend(one.decode(errors="replace") for one in lines)
        if line:
            self.last_lines.append(line.decode(errors="replace"))

    def _keep(self, data: bytes) -> None:
        """In the log, as far as its disk takes it: the rank is not to wait for that."""
        try:
            self._log.write(data)
        except OSError as error:
            if not self._failed:
                self._failed = True
                print(f"{self._log.name}: can't be written ({error.strerror})", file=sys.stderr)


def reason(code: int, lines: Sequence[str]) -> str:
    """Why a rank ended, in a few words: its signal, or the error that it printed last."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (by hand, or for want of memory)" if code == -9 else "")
    if code == 0:
        return "ended"
    said = [re.sub(r"^\[rank\d+\]: ?", "", line).strip() for line in lines]
    last = (_errors(said) or [line for line in said if line] or ["it said nothing"])[-1]
    return f"exit code {code}: {last[:300]}"


def _errors(lines: Sequence[str]) -> list[str]:
    """The lines that name an error; those that name one by the way where there are no others."""
    found: list[str] = []
    by_the_way: list[str] = []
    into = found
    for line in lines:
        if _ASIDE.search(line):
            into = by_the_way
        elif _ERROR.search(line):
            into.append(line)
            into = found
    return found or by_the_way


def _open_log(folder: Path, rank: int) -> IO[bytes]:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / f"rank-{rank}.log").open("ab", buffering=0)
        log.write(f"--- {started} rank {rank} on {socket.gethostname()}\n".encode())
    except OSError as error:
        print(f"{folder}: no log of rank {rank} can be written ({error})", file=sys.stderr)
        return open(os.devnull, "ab", buffering=0)
    return log
