"""A run's folder has one writer: a job that was submitted twice would spoil its own checkpoints."""

import contextlib
import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

NAME = ".lock"
PATIENCE_S = 60.0  # for a job that is ending, or a host that was lost and does not know it yet
_LOOK_S = 0.1


class RunBusyError(Exception):
    """Another job trains into this run's folder. The text is one sentence."""

    exit_code = 1  # no mistake: it may pass, so that a job may be started again


@contextmanager
def sole_writer(folder: Path, stop_asked: Callable[[], bool]) -> Iterator[None]:
    """Holds a run's folder for this job; all ranks call it, the main one holds it.

    The system gives the lock back with the process, however that ends.

    Args:
        folder: of the run.
        stop_asked: whether to wait no longer for another job to end.

    Raises:
        RunBusyError: another job holds it; on every rank.
    """
    file, mistake, is_new = None, "", False
    if dist.get_rank() == 0:
        try:
            is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / NAME).open("a+", encoding="utf-8")
            mistake = _wait(file, folder, stop_asked)
        except OSError as error:
            mistake = (
                f"run: {folder} can't be written to ({error.strerror or error}); mend that, or "
                "choose another --run"
            )
    told: list[Any] = [mistake]
    dist.broadcast_object_list(told)
    try:
        if told[0]:
            raise RunBusyError(told[0])
        yield
    finally:
        with contextlib.suppress(OSError):  # a disk that has refused the lock's text before
            if is_new and os.listdir(folder) == [NAME]:  # a mistake in the recipe leaves nothing
                shutil.rmtree(folder, ignore_errors=True)
            if file:
                file.close()


def _wait(file: IO[str], folder: Path, stop_asked: Callable[[], bool]) -> str:
    """Takes the lock as soon as it is free; returns why it could not, if so."""
    until, told = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            # Of the process, not of the file: loaders that are forked later do not share it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() > until or stop_asked():
                return (
                    f"run: {folder} is being trained into by {holder}; end that job, choose "
                    f"another --run, or remove {file.name} if no such process is left"
                )
            if not told:
                told = True
                print(f"{folder} is held by {holder}: waiting for its end", file=sys.stderr)
            time.sleep(_LOOK_S)
        except OSError:
            return ""  # some network file systems have no locks
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return ""
