"""Two phases to a finished folder: write into `<output>.partial`, then rename.

Whatever happens, and whenever, a folder of the output's name is whole if it exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import DataError
from .manifest import MANIFEST_NAME

# What a run that was killed may have left in the partial folder; anything else is a user's.
_OUR_FILES = re.compile(r"shard-\d{6,}\.tar|" + re.escape(MANIFEST_NAME) + r"(\.tmp)?")


@contextlib.contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A locked, empty folder beside the output; it goes, with parents made for it, on any error."""
    partial = output.with_name(output.name + ".partial")
    made = [parent for parent in partial.parents if not parent.exists()]
    if partial.is_dir():
        strangers = [p.name for p in partial.iterdir() if not _OUR_FILES.fullmatch(p.name)]
        if strangers:
            raise DataError(
                f"{partial}: is needed for the work in progress but holds {strangers[0]!r}; "
                "move it away or give another output."
            )
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, partial)
        for leftover in partial.iterdir():  # of a run that was killed
            leftover.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
    finally:
        os.close(handle)


def _lock(handle: int, partial: Path) -> None:
    """Refuse a second run into the same folder. The lock goes with the process, however it ends."""
    busy = DataError(f"{partial}: another run is writing there; wait for it to end.")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:
        return  # some network file systems have no locks
    # The other run may have published the folder between our opening and locking it.
    if not partial.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
        raise busy


def publish(partial: Path, output: Path) -> None:
    """Make the finished folder durable and give it its name."""
    _sync_folder(partial)
    os.rename(partial, output)  # replaces an empty folder, fails on any other
    _sync_folder(output.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
