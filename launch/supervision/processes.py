"""Processes of one job: started, looked at, and ended without a chance to hit another's.

A child that has ended keeps its number until it is waited for, so it is looked at without that, and
its group is signalled before. Other processes of a job are known by a mark in their environment,
which no other job has; some, as the ssh of pdsh, leave their launcher's group.
"""

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...recipes.files import write_whole
from ..command import Command
from ..job import LaunchError

FILES = 16_384  # ranks of the largest jobs


def start(command: Command, **options: Any) -> "subprocess.Popen[Any]":
    """Starts a command, whose files are there; `options` are those of Popen.

    Raises:
        LaunchError: there is no such program, or it is none.
    """
    try:
        return subprocess.Popen(command.words, **options)
    except OSError as error:
        raise LaunchError(
            f"{command.words[0]}: can't be started ({error.strerror}); is it installed, and on the "
            "PATH?"
        ) from None


def write_files(command: Command, *folders: Path) -> None:
    """Makes folders, and the files that a command uses.

    Raises:
        LaunchError: the disk refuses one.
    """
    wanted: list[tuple[Path, str | None]] = [(folder, None) for folder in folders]
    wanted += [(file.path, file.text) for file in command.all_files]
    for path, text in wanted:
        try:
            if text is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                write_whole(path, text)
        except OSError as error:
            raise LaunchError(
                f"{path}: can't be written ({error.strerror}); mend that, or choose another --run"
            ) from None


def allow_many_files() -> None:
    """More open files than the usual 1,024, if this process may have them.

    Not as many as it may: children inherit the limit, and pdsh closes each number up to it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
    for process, handle in _marked(mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if handle is None:
                os.kill(process, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(handle, signal.SIGKILL)


def _marked(mark: str) -> Iterator[tuple[int, int | None]]:
    """The processes, each with a handle, which stays its own whatever becomes of its number."""
    for folder in Path("/proc").glob("[0-9]*"):
        process = int(folder.name)
        try:
            handle = _handle(process)
        except ProcessLookupError:  # it has ended meanwhile
            continue
        try:
            # empty for one that has ended
            if mark.encode() in (folder / "environ").read_bytes():
                yield process, handle
        except OSError:  # ended, or another user's
            continue
        finally:
            if handle is not None:
                os.close(handle)


def _handle(process: int) -> int | None:
    """None where there are none: in old kernels, some sandboxes, Pythons built for old systems.

    There the number must do: it has been this process's a moment before.
    """
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        raise
    except (AttributeError, OSError):
        return None
