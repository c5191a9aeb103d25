"""The images of a folder, and lists that choose some: VOC's image sets, YOLO's `train.txt`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .errors import DataError

# GIF and TIFF are no formats of ours: they are listed to be refused by name, not passed over.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def files_below(folder: Path, suffixes: tuple[str, ...], what: str) -> list[str]:
    """All files with one of the suffixes, relative to the folder, sorted.

    Args:
        folder: searched with its subfolders; links to folders are not followed.
        suffixes: in lower case.
        what: is looked for, for the sentence.

    Raises:
        DataError: there is no such folder, or it can't be listed.
    """

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: the folder can't be listed ({error.strerror}); "
            f"give a readable folder of {what}."
        )

    return sorted(
        PurePosixPath(root, name).relative_to(PurePosixPath(folder)).as_posix()
        for root, _, names in os.walk(folder, onerror=fail)
        for name in names
        if name.lower().endswith(suffixes)
    )


def read_image_list(path: Path) -> set[str]:
    """The images that a list names, one a line, by path, file name or stem; without suffixes.

    Raises:
        DataError: the list can't be read or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: the list of images can't be read ({why}); give a text file with one a line."
        ) from None
    listed = {_without_suffix(line.strip()) for line in lines if line.strip()}
    if not listed:
        raise DataError(f"{path}: the list of images is empty; name one a line.")
    return listed


def _without_suffix(name: str) -> str:
    """`./train/12.5.jpg` → `train/12.5`, and `12.5` stays: only a picture's suffix is one."""
    path = PurePosixPath(name)
    return str(path.with_suffix("") if path.suffix.lower() in SUFFIXES else path)


def choose(names: Iterable[str], listed: set[str]) -> tuple[list[str], set[str]]:
    """Those of the names that a list means, and those of the list that mean none of them.

    Folders count as far as both have them: `train/1` is not `val/1`, and `1` is either.

    Args:
        names: files relative to their folder, with suffixes.
        listed: of `read_image_list`.
    """
    by_stem: dict[str, list[tuple[str, ...]]] = {}
    for entry in listed:
        by_stem.setdefault(PurePosixPath(entry).name, []).append(PurePosixPath(entry).parts)
    chosen, met = [], set()
    for name in names:
        parts = PurePosixPath(name).with_suffix("").parts
        for other in by_stem.get(parts[-1], []):
            common = min(len(parts), len(other))
            if parts[-common:] == other[-common:]:
                chosen.append(name)
                met.add(str(PurePosixPath(*other)))
                break
    return chosen, listed - met
