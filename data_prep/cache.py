"""A folder of chunks on the local disk: bounded in bytes, shared by all processes of a machine.

What is stored has the same bytes for ever, as its name holds its digest, so nothing is ever
brought up to date: a file is there or it is not. Files appear by a rename, whole; the least
recently used ones are removed by whoever fills the cache over its bound. Nobody waits for
another but for the microseconds in which the shared count of bytes is changed.
"""

import contextlib
import fcntl
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import DataError

# Evicting lists the whole folder. One that frees an eighth is rare: at 50 GiB once in 5,000
# fetched chunks of eight COCO pictures.
KEPT_AFTER_EVICTION = 7 / 8
# What evicting may remove. A user may name a folder that holds other things too.
_FOLDERS = (re.compile(r"[0-9a-f]{16}"), re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar"))
_FILE = re.compile(r"\d+-[0-9a-f]{16}(\.\d+\.partial)?")


@dataclass(frozen=True)
class CacheOptions:
    """How remote shards are read: where chunks are kept, how many, and how long to wait.

    A folder on the machine's own disk serves best; a run of another bound may share it, and the
    smaller bound wins.
    """

    folder: str = "~/.cache/convnext-yolo"
    gib: float = 50
    patience_s: float = 300  # below the 600 s for which NCCL lets ranks wait for one another


class ChunkCache:
    """Chunks by name, `<16 hex digits>/<shard>.tar/<number>-<digest>`.

    Args:
        folder: made if it is not there; the chunks go into `chunks` in it.
        bound_bytes: of all chunks together.
        now_ns: the clock of "recently used".

    Raises:
        DataError: the folder can't be made or written into.
    """

    def __init__(
        self, folder: Path, bound_bytes: int, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.folder, self.bound_bytes, self.now_ns = folder / "chunks", bound_bytes, now_ns
        self._complained = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked("usage"):
                pass
        except OSError as error:
            raise DataError(
                f"the cache folder {folder}: {error.strerror}; name another with data.cache "
                "(of `eval`: --cache)"
            ) from None

    def open(self, name: str, length_bytes: int) -> IO[bytes] | None:
        """A cached chunk, or None where there is none of that length."""
        path = self.folder / name
        try:
            file = path.open("rb")
        except OSError:
            return None
        if os.fstat(file.fileno()).st_size != length_bytes:  # of a disk that was full, or a crash
            file.close()
            return None
        self._touch(path)
        return file

    def write(self, name: str, content: bytes) -> None:
        """Keeps a chunk; one that does not fit, or a disk that is full, keeps nothing."""
        if len(content) > self.bound_bytes:
            return
        path = self.folder / name
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            self._reserve(len(content))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            self._touch(partial)
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._complained:
                self._complained = True
                print(
                    f"the cache folder {self.folder.parent}: {error.strerror}; reading goes on, "
                    "but what is not in it is fetched again each time",
                    file=sys.stderr,
                    flush=True,
                )

    def _touch(self, path: Path) -> None:
        now_ns = self.now_ns()
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's: no harm
            os.utime(path, ns=(now_ns, now_ns))

    def _reserve(self, length_bytes: int) -> None:
        """Counts bytes that are about to be written, and makes room for them if need be."""
        with self._locked("usage") as file:
            used = _read_count(file)
            if used is not None:
                used += length_bytes
                _write_count(file, used)
        while (used is None or used > self.bound_bytes) and self._evict(length_bytes):
            with self._locked("usage") as file:
                used = _read_count(file)

    def _evict(self, pending: int) -> bool:
        """Removes what was not used for longest, unless another process is at it.

        Args:
            pending: bytes that are counted, but not yet in a file.

        Returns:
            Whether to look again: others do not wait for this, and may have written meanwhile.
        """
        with self._locked("evicting", wait=False) as lock:
            if lock is None:  # who is at it looks again
                return False
            with self._locked("usage") as file:
                before = _read_count(file) or 0
                _write_count(file, before)  # from here on it is known, and others add to it
            target = min(KEPT_AFTER_EVICTION * self.bound_bytes, self.bound_bytes - pending)
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= target:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    total -= size
            with self._locked("usage") as file:
                meanwhile = max(0, (_read_count(file) or 0) - before)  # what others have added
                _write_count(file, total + pending + meanwhile)
            return total <= target

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """When last used in ns, bytes and path of everything in the cache."""
        for data_set in _entries(self.folder, _FOLDERS[0]):
            for shard in _entries(data_set.path, _FOLDERS[1]):
                for entry in _entries(shard.path, _FILE):
                    with contextlib.suppress(OSError):  # gone meanwhile
                        stat = entry.stat(follow_symlinks=False)
                        yield stat.st_mtime_ns, stat.st_size, entry.path

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[int | None]:
        """A small file that one process at a time has; None if that is another, and no `wait`."""
        file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            yield None
            return
        try:
            yield file
        finally:
            os.close(file)  # and the lock is off


def used_bytes(folder: Path) -> int:
    """The bytes that all chunks of a cache folder take; 0 where nobody knows."""
    try:
        return int((folder / "chunks" / "usage").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _entries(folder: str | Path, name: re.Pattern[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [e for e in entries if name.fullmatch(e.name) and not e.is_symlink()]
    except OSError:
        return []


def _read_count(file: int | None) -> int | None:
    """The bytes in use; None if nobody knows, as at first or after a crash."""
    assert file is not None
    text = os.pread(file, 32, 0)
    return int(text) if text.isdigit() else None


def _write_count(file: int | None, count: int) -> None:
    assert file is not None
    # The same width always: a longer number never leaves its tail behind a shorter one.
    os.pwrite(file, b"%020d" % count, 0)
