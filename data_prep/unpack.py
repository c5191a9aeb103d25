"""A folder out of a zip archive, in two phases: into `<folder>.partial`, then rename.

A run that was killed is gone on with: a file of the partial folder that has its size and CRC is
not written again.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from .errors import DataError
from .publish import publish

_BLOCK_BYTES = 1 << 20


def unpack(
    archive: Path,
    target: Path,
    files: int,
    members: Mapping[str, int],
    progress: bool = True,
) -> None:
    """Write the archive's folder of the target's name as the target.

    Args:
        archive: the zip file.
        target: the folder to make, beside which is room for the partial one; empty if it exists.
        files: how many the archive must give.
        members: name: bytes of the only files to unpack; empty for all of the folder's.
        progress: show a bar on stderr.

    Raises:
        DataError: the archive is damaged, holds something else than that, or names that lead
            elsewhere. Nothing has been written outside the partial folder.
        OSError: a file can't be written.
    """
    from tqdm import tqdm

    folder = target.name
    partial = target.with_name(f"{folder}.partial")
    try:
        with zipfile.ZipFile(archive) as bundle:
            wanted = _wanted(archive, bundle, folder, files, members)
            partial.mkdir(exist_ok=True)
            _refuse_strangers(partial, set(wanted))
            bar = tqdm(
                total=sum(entry.file_size for entry in wanted.values()),
                desc=f"unpack {folder}",
                unit="B",
                unit_scale=True,
                delay=2,
                disable=not progress,
            )
            with bar:
                for name, entry in wanted.items():
                    if not _is_whole(partial / name, entry):
                        _extract(bundle, entry, partial / name)
                    bar.update(entry.file_size)
    # encrypted entries are a RuntimeError, unknown methods of compression a NotImplementedError
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(
            f"{archive}: can't be unpacked ({error}); remove it and fetch it again."
        ) from None
    # One call for all: the archive goes after this, and a sync for each of 118,287 files would
    # take longer than writing them.
    os.sync()
    publish(partial, target)


def _wanted(
    archive: Path, bundle: zipfile.ZipFile, folder: str, files: int, members: Mapping[str, int]
) -> dict[str, zipfile.ZipInfo]:
    """The entries to unpack by the plain names of their files."""
    wanted: dict[str, zipfile.ZipInfo] = {}
    mend = "take the official archive."
    for entry in bundle.infolist():
        if entry.is_dir():
            continue
        parent, _, name = entry.filename.rpartition("/")
        steps = entry.filename.split("/")
        if ".." in steps or steps[0] == "" or "\\" in entry.filename:
            raise DataError(f"{archive}: holds {entry.filename!r}, which leads elsewhere; {mend}")
        # Only plain names in the folder are joined to a path.
        if parent != folder or name == "." or (members and name not in members):
            continue
        if name in wanted:
            raise DataError(f"{archive}: holds {entry.filename!r} twice; {mend}")
        if members and entry.file_size != members[name]:
            raise DataError(
                f"{archive}: {entry.filename} is {entry.file_size:,} bytes long, "
                f"not {members[name]:,}; {mend}"
            )
        wanted[name] = entry
    if len(wanted) != files:
        what = " and ".join(members) or f"{files:,} files"
        raise DataError(f"{archive}: holds {len(wanted):,} files of {folder}/, not {what}; {mend}")
    return wanted


def _refuse_strangers(partial: Path, names: set[str]) -> None:
    for path in partial.iterdir():
        if path.name not in names or not path.is_file():
            raise DataError(
                f"{partial}: is needed for the work in progress but holds {path.name!r}; "
                "move it away or give another output."
            )


def _is_whole(path: Path, entry: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != entry.file_size:
        return False
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc == entry.CRC


def _extract(bundle: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    # zipfile reads no more than the entry's stated size, and compares the CRC at its end.
    with bundle.open(entry) as source, path.open("wb") as file:
        while block := source.read(_BLOCK_BYTES):
            file.write(block)
