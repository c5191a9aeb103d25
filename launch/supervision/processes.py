"""Processes of one job: looked at and ended without a chance to hit another's.

A child that has ended keeps its number until it is waited for, so it is looked at without that, and
its group is signalled before. Other processes of a job are known by a mark in their environment,
which no other job has; some, as the ssh of pdsh, leave their launcher's group.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def has_ended(child: "subprocess.Popen[Any]") -> bool:
    """Whether a child that nobody has waited for has ended; its number stays taken."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def state(process: int) -> str:
    """The state of a process as in /proc: R runs, S sleeps, D waits for a disk, T is stopped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it is gone
        return ""


def kill_group(child: "subprocess.Popen[Any]") -> None:
    """Ends all of the session that a child leads; nobody has waited for the child."""
    # it has left its group, or given up its user
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def any_marked(mark: str) -> bool:
    """Whether a living process of this machine has a mark in the environment it began with."""
    return any(True for _ in _marked(mark))


def kill_marked(mark: str) -> None:
    """Ends every process of this machine that began with a mark in its environment."""
    for handle in _marked(mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)


def _marked(mark: str) -> Iterator[int]:
    """Handles, which stay those of the process looked at whatever becomes of its number."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            handle = os.pidfd_open(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
        try:
            # empty for one that has ended
            if mark.encode() in (folder / "environ").read_bytes():
                yield handle
        except OSError:  # ended, or another user's
            continue
        finally:
            os.close(handle)
