"""`fetch-coco`: the official COCO 2017 archives, checked and unpacked as `shard` takes them.

    OUTPUT/annotations/instances_train2017.json, instances_val2017.json
    OUTPUT/train2017/*.jpg
    OUTPUT/val2017/*.jpg

Each archive is downloaded to `<name>.zip.partial`, renamed when its MD5 is right, unpacked into
`<folder>.partial`, renamed when whole, then removed. A run that ends anywhere is gone on with from
there; a folder that has its name is finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .download import check_file, download
from .errors import DataError
from .unpack import unpack

OFFICIAL_MIRROR = "http://images.cocodataset.org"  # its certificate is for another name: no https


@dataclass(frozen=True)
class Archive:
    """One zip archive, and the folder that comes of it.

    Args:
        path: of the zip below the mirror's URL.
        size_bytes: of the zip.
        md5: of the zip, in hexadecimal digits.
        folder: its name in the zip and in the output.
        files: how many the folder gets.
        unpacked_bytes: the room they take, or a little more.
        members: name: bytes of the files to unpack; empty for all.
        split: "train" or "val", the only one to need it; empty if both do.
    """

    path: str
    size_bytes: int
    md5: str
    folder: str
    files: int
    unpacked_bytes: int
    members: Mapping[str, int] = field(default_factory=dict)
    split: str = ""

    @property
    def name(self) -> str:
        """The zip's file name."""
        return self.path.rpartition("/")[2]


# COCO publishes no checksums. Sizes are the Content-Length that images.cocodataset.org gives, MD5s
# those of the files it serves; PaddleDetection (ppdet/utils/download.py) checks by the same. JPEGs
# hardly shrink in a zip, so their room is the zip's and 2 %: each file loses half a block of 4 KiB.
# Small archives come first, so that a mistake shows early.
COCO_2017 = (
    Archive(
        path="annotations/annotations_trainval2017.zip",
        size_bytes=252_907_541,
        md5="f4bbac642086de4f52a3fdda2de5fa2c",
        folder="annotations",
        files=2,
        unpacked_bytes=469_785_474 + 19_987_840,
        members={"instances_train2017.json": 469_785_474, "instances_val2017.json": 19_987_840},
    ),
    Archive(
        path="zips/val2017.zip",
        size_bytes=815_585_330,
        md5="442b8da7639aecaf257c1dceb8ba8c80",
        folder="val2017",
        files=5_000,
        unpacked_bytes=832_000_000,
        split="val",
    ),
    Archive(
        path="zips/train2017.zip",
        size_bytes=19_336_861_798,
        md5="cced6f7f71b7629ddf16f17bbcfab6b2",
        folder="train2017",
        files=118_287,
        unpacked_bytes=19_724_000_000,
        split="train",
    ),
)


def fetch_coco(
    output: Path,
    mirror: str = OFFICIAL_MIRROR,
    archives: Path | None = None,
    only: Collection[str] = ("train", "val"),
    keep_archives: bool = False,
    table: Sequence[Archive] = COCO_2017,
    sleep: Callable[[float], object] = time.sleep,
    progress: bool = True,
) -> None:
    """Fetch, check and unpack COCO 2017; what is finished already is left alone.

    Args:
        output: the folder for the data; made where missing.
        mirror: http, https or file URL with the official one's paths below it.
        archives: a folder that holds the zips already; nothing is downloaded then.
        only: the splits to fetch; annotations come with each, and are of both.
        keep_archives: leave the downloaded zips in the output.
        table: what there is to fetch.
        sleep: waits so many seconds before the next attempt at a download.
        progress: show bars, and what was done, on stderr.

    Raises:
        DataError: too little room, a zip that is missing or not the official one, a server that
            can't be reached, a folder of these names with something else in it.
    """
    output = Path(output).resolve()
    if mirror.partition("://")[0].lower() not in ("http", "https", "file"):
        raise DataError(f"--mirror {mirror}: is no http, https or file URL; give one, or none.")
    wanted = [archive for archive in table if not archive.split or archive.split in only]
    try:
        missing = [archive for archive in wanted if not _is_finished(output, archive)]
        if archives is not None:
            _check_folder(archives, missing)
        _check_room(output, missing, archives is None, keep_archives)
        output.mkdir(parents=True, exist_ok=True)
        with _only_run(output):
            for archive in wanted:
                folder, done = output / archive.folder, "is there already"
                if not _is_finished(output, archive):
                    source = (archives or output) / archive.name
                    if source.exists():
                        check_file(source, archive.size_bytes, archive.md5, progress)
                    else:
                        url = f"{mirror.rstrip('/')}/{archive.path}"
                        download(url, source, archive.size_bytes, archive.md5, sleep, progress)
                    unpack(source, folder, archive.files, archive.members, progress)
                    if archives is None and not keep_archives:
                        source.unlink()
                    done = f"{archive.files:,} files"
                if progress:
                    print(f"{folder}: {done}", file=sys.stderr)
    except OSError as error:
        raise DataError(
            f"{error.filename or output}: {error.strerror or error}; mend that, then run the "
            "command again to go on."
        ) from error


def _is_finished(output: Path, archive: Archive) -> bool:
    """Whether the folder is there, and whole.

    Ours is whole if it exists. But it may be a user's own, unpacked by hand and not to the end.
    """
    folder = output / archive.folder
    if not folder.exists():
        return False
    sizes = {
        entry.name: entry.stat().st_size if archive.members else 0 for entry in os.scandir(folder)
    }
    if not sizes:
        return False
    mend = "move the folder away, or give another output."
    for name, size_bytes in archive.members.items():
        if sizes.get(name) != size_bytes:
            found = f"is {sizes[name]:,} bytes long" if name in sizes else "is missing"
            raise DataError(f"{folder / name}: {found}, where {size_bytes:,} are due; {mend}")
    if not archive.members and len(sizes) != archive.files:
        raise DataError(
            f"{folder}: holds {len(sizes):,} files, where {archive.files:,} are due; {mend}"
        )
    return True


def _check_folder(archives: Path, missing: Sequence[Archive]) -> None:
    """Before 20 GB are hashed: is all that is needed there, and of its size?"""
    for archive in missing:
        path = archives / archive.name
        if not path.is_file():
            raise DataError(
                f"--archives {archives}: holds no {archive.name}; put it there, or leave "
                "--archives out to download it."
            )
        if (found_bytes := path.stat().st_size) != archive.size_bytes:
            raise DataError(
                f"{path}: is {found_bytes:,} bytes long, not {archive.size_bytes:,}; "
                "fetch it again."
            )


# --- room on the disk ----------------------------------------------------------------------------


def _check_room(output: Path, missing: Sequence[Archive], downloads: bool, keep: bool) -> None:
    needed_bytes = _needed_bytes(output, missing, downloads, keep)
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    free_bytes = shutil.disk_usage(there).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"{output}: about {needed_bytes / 1e9:.1f} GB are needed there, "
            f"{free_bytes / 1e9:.1f} GB are free; make room or give another output."
        )


def _needed_bytes(output: Path, missing: Sequence[Archive], downloads: bool, keep: bool) -> int:
    """The most that is in use at once beyond what is in use now: a zip goes once it's unpacked."""
    used = most = 0
    for archive in missing:
        zips = (output / archive.name, output / f"{archive.name}.partial")
        if downloads:
            there = max((path.stat().st_size for path in zips if path.exists()), default=0)
            used += max(0, archive.size_bytes - there)
        partial = output / f"{archive.folder}.partial"
        there = sum(e.stat().st_size for e in os.scandir(partial)) if partial.is_dir() else 0
        used += max(0, archive.unpacked_bytes - there)
        most = max(most, used)
        if downloads and not keep:
            used -= archive.size_bytes
    return most


@contextlib.contextmanager
def _only_run(output: Path) -> Iterator[None]:
    """Refuse a second run into the same folder. The lock goes with the process, however it ends."""
    handle = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{output}: another run is fetching to there; wait for it to end."
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(handle)
