"""Two phases to a finished folder: write into `<output>.partial`, then rename.

Whatever happens, and whenever, a folder of the output's name is whole if it exists. What a run that
was ended left in the partial folder is taken up by the next (see `journal`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from .errors import DataError
from .findings import REPORT_NAME, Report
from .journal import JOURNAL_NAME
from .manifest import MANIFEST_NAME, Manifest, ShardEntry
from .records import ImageRecord
from .samples import stored_image

# What a run that was killed may have left in the partial folder; anything else is a user's.
OUR_FILES = re.compile(
    r"shard-\d{6,}\.tar|"
    + "|".join(re.escape(name) for name in (JOURNAL_NAME, REPORT_NAME, MANIFEST_NAME))
    + r"|.*\.json\.tmp"
)
MEND = "give another output or remove it"


class LocalOutput:
    """An output folder on this machine.

    Args:
        path: of the folder; a link is followed: the rename must happen beside its target.
    """

    def __init__(self, path: Path):
        self._path = path.resolve()
        self.name = str(self._path)

    def existing(self) -> Manifest | None:
        """The manifest of an output that is there already.

        Raises:
            DataError: something else is there, or the manifest is damaged.
        """
        if not self._path.exists() or (self._path.is_dir() and not any(self._path.iterdir())):
            return None
        if not (self._path / MANIFEST_NAME).is_file():
            raise DataError(f"{self.name}: exists and is not a shard folder; {MEND}.")
        return Manifest.load(self._path)

    def report(self) -> Report:
        """The report of an output that is there already."""
        return Report.load(self._path)

    def check(self, manifest: Manifest, images: Sequence[ImageRecord]) -> None:
        """See to it that an existing output still holds these images.

        Raises:
            DataError: a shard is missing or of another size, or an image has changed since.
        """
        (self._path / JOURNAL_NAME).unlink(missing_ok=True)  # killed just after the rename
        if problems := manifest.missing(self._path):
            raise DataError(problems[0])
        if changed := self._changed_image(manifest, images):
            raise DataError(
                f"{self.name}: {changed} has changed since these shards were made; {MEND}."
            )

    def _changed_image(self, manifest: Manifest, images: Sequence[ImageRecord]) -> Path | None:
        """The first image whose bytes aren't the shards'. Only newer files are compared."""
        made_ns = (self._path / MANIFEST_NAME).stat().st_mtime_ns
        places = {
            image_id: (entry.name, offset)
            for entry in manifest.shards
            for image_id, offset in zip(
                entry.image_ids.tolist(), entry.offsets.tolist(), strict=True
            )
        }
        for record in images:
            try:
                stat = record.path.stat()
            except OSError:
                continue  # refused then and now, or refused now: the shards are not the worse
            # The change time: copying tools carry the modification time of the original along.
            if max(stat.st_mtime_ns, stat.st_ctime_ns) <= made_ns:
                continue
            if record.id not in places:
                return record.path  # was refused, and may have been mended
            name, offset = places[record.id]
            if stored_image(self._path / name, offset) != record.path.read_bytes():
                return record.path
        return None

    def working(self) -> contextlib.AbstractContextManager[Path]:
        """The folder to write into (see `work_folder`)."""
        return work_folder(self._path.with_name(self._path.name + ".partial"))

    def prepare(self, folder: Path, shards: Collection[str], done: Collection[str]) -> None:
        """Clear the working folder, but for its journal and, of all shards, those done."""
        keep_only(folder, {*done, JOURNAL_NAME})

    def has(self, folder: Path, entry: ShardEntry) -> bool:
        """Whether a shard that the journal notes is really there."""
        path = folder / entry.name
        return path.is_file() and path.stat().st_size == entry.bytes

    def take(self, folder: Path, entry: ShardEntry) -> None:
        """A shard is done and lies in the working folder: here, it stays there."""

    def commit(self, folder: Path) -> None:
        """All is in the working folder, manifest included: make it durable and give it its name."""
        publish(folder, self._path)
        (self._path / JOURNAL_NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A locked folder for work in progress; after an error it stays if its journal notes anything.

    Else it goes, with parents made for it.

    Raises:
        DataError: another run works there, or a user's files are there.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    if folder.is_dir():
        strangers = [p.name for p in folder.iterdir() if not OUR_FILES.fullmatch(p.name)]
        if strangers:
            raise DataError(
                f"{folder}: is needed for the work in progress but holds {strangers[0]!r}; "
                "move it away or give another output."
            )
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, folder)
        try:
            yield folder
        except BaseException:
            if not (folder / JOURNAL_NAME).exists():
                shutil.rmtree(folder, ignore_errors=True)
                for parent in made:
                    with contextlib.suppress(OSError):
                        parent.rmdir()
            raise
    finally:
        os.close(handle)


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Remove what a run that was ended left half-written in its working folder."""
    for leftover in folder.iterdir():
        if leftover.name not in names:
            leftover.unlink()


def _lock(handle: int, folder: Path) -> None:
    """Refuse a second run into the same folder. The lock goes with the process, however it ends."""
    busy = DataError(f"{folder}: another run is writing there; wait for it to end.")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:
        return  # some network file systems have no locks
    # The other run may have published the folder between our opening and locking it.
    if not folder.exists() or not os.path.samestat(os.fstat(handle), folder.stat()):
        raise busy


def publish(partial: Path, output: Path) -> None:
    """Make the finished folder durable and give it its name."""
    _sync(partial)
    os.rename(partial, output)  # replaces an empty folder, fails on any other
    _sync(output.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
