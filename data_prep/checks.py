"""Checks that every annotation format shares: ids, file names, image files, boxes.

Legend: M boxes of all images of a data set. A check of one entry raises a DataError whose sentence
begins with `where`: the file and the entry in it. A check of many tells `Findings`.
"""

from __future__ import annotations

import math
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, RefusedError
from .findings import Findings

# A box may cross the border by this much: annotation tools count pixels from 0 or from 1 and round.
# Further outside, the box or the image size is wrong, and strict lets nobody guess which.
BORDER_TOLERANCE_PX = 1.0
# Below this, a box over the border is the rounding of x + w and not worth a count.
_ROUNDING_PX = 0.01
# Any coordinate beyond this is a mistake; the bound also keeps huge integers out of numpy.
_COORDINATE_LIMIT_PX = 1e9
_ID_LIMIT = 2**63  # ids travel as int64
_SHOWN_CHARACTERS = 120


def shown(value: Any) -> str:
    """A value for a sentence: what a file holds there can be of any length."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _found(entry: dict[str, Any], key: str) -> str:
    return f"{key} is {shown(entry[key])}" if key in entry else f"{key} is missing"


def identifier(entry: dict[str, Any], key: str, where: str) -> int:
    """The whole number >= 0 under `key`."""
    value = entry.get(key)
    if type(value) is int and 0 <= value < _ID_LIMIT:  # bool is an int too
        return value
    raise DataError(f"{where}: {_found(entry, key)}; give a whole number from 0 up.")


def size_px(entry: dict[str, Any], key: str, where: str) -> int:
    """The width or height under `key`: whole pixels, at least 1."""
    value = entry.get(key)
    if type(value) is float and value.is_integer():  # some exporters write 640.0
        value = int(value)
    if type(value) is int and 1 <= value < _COORDINATE_LIMIT_PX:
        return value
    raise DataError(f"{where}: {_found(entry, key)}; give the image's {key} in whole pixels.")


def box_xywh(entry: dict[str, Any], where: str) -> list[float]:
    """The four finite numbers under `bbox`.

    Raises:
        RefusedError: there are no such four.
    """
    box = entry.get("bbox")
    # The comparison is False for nan as well; and numpy would take strings for numbers.
    if (
        isinstance(box, list)
        and len(box) == 4
        and all(type(v) in (int, float) and abs(v) < _COORDINATE_LIMIT_PX for v in box)
    ):
        return box
    raise RefusedError(
        "box_values",
        f"{where}: {_found(entry, 'bbox')}; give four finite numbers x, y, width, height "
        "in pixels, or remove the annotation.",
    )


def number_px(text: str | None) -> float:
    """A coordinate from a text file; nan where it is none, or beyond reason."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) < _COORDINATE_LIMIT_PX else math.nan


def inside(file_name: Any, where: str) -> str:
    """The normal form of a file name that stays inside the image folder."""
    if not isinstance(file_name, str) or not file_name.strip("./ ") or "\0" in file_name:
        raise DataError(f"{where}: file_name is {shown(file_name)}; name the image file.")
    if file_name.startswith("/") or ".." in file_name.split("/"):
        raise DataError(
            f"{where}: file_name {shown(file_name)} leaves the image folder; "
            "name the file relative to that folder."
        )
    return posixpath.normpath(file_name)


def refuse_twice(values: Iterable[Hashable], what: str, path: Path) -> None:
    """Refuse a list in which a value comes more than once."""
    value, times = next(iter(Counter(values).most_common(1)), (None, 0))
    if times > 1:
        raise DataError(
            f"{path}: the {what} {shown(value)} is given {times} times; keep one of them."
        )


def files_there(names: Iterable[str], folder: Path) -> list[bool]:
    """Which names are files in `folder`.

    Each folder is listed once: 118,000 single look-ups take minutes on a network file system.

    Raises:
        DataError: a folder can't be listed.
    """
    listed: dict[str, set[str]] = {}
    found = []
    for name in names:
        parent, base = posixpath.split(name)
        if parent not in listed:
            listed[parent] = _files_in(folder / parent)
        found.append(base in listed[parent])
    return found


def _files_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not a legal name
        return set()
    except OSError as error:
        raise DataError(
            f"{folder}: the image folder can't be listed ({error.strerror}); make it readable."
        ) from None


def check_boxes(
    boxes_xywh: np.ndarray,
    sizes_px: np.ndarray,
    describe: Callable[[int], str],
    findings: Findings,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn all boxes into xyxy inside their images.

    Args:
        boxes_xywh: [M, 4] float64, finite.
        sizes_px: [M, 2] float64, width and height of each box's image.
        describe: names box m and its numbers, as the file gives them, for the sentence.
        findings: is told of boxes without area, with a negative side, outside, and clipped.

    Returns:
        boxes [M, 4] float32 xyxy; which of them can be used, [M] bool; and which of those were
        cut by more than rounding (1 px), [M] bool.
    """

    def tell(kind: str, which: np.ndarray, what: Callable[[int], str], mend: str) -> None:
        findings.add_all(
            kind, np.flatnonzero(which).tolist(), lambda m: f"{describe(m)} {what(m)}; {mend}."
        )

    def image(m: int) -> str:
        return f"the {sizes_px[m, 0]:.0f}x{sizes_px[m, 1]:.0f} image"

    mend = "correct it or remove the annotation"
    good = (boxes_xywh[:, 2:] != 0).all(axis=1)
    tell("box_empty", ~good, lambda m: "has a width or height of zero", mend)
    negative = good & (boxes_xywh[:, 2:] < 0).any(axis=1)
    tell("box_negative", negative, lambda m: "has a negative width or height", mend)
    good &= ~negative

    corners = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
    boxes_xyxy = np.clip(corners, 0, np.tile(sizes_px, 2)).astype(np.float32)
    # float32 as well as clipping can leave nothing: 1e-6 px at x = 600, or a box on the border.
    empty = good & (boxes_xyxy[:, 2:] <= boxes_xyxy[:, :2]).any(axis=1)
    tell("box_outside", empty, lambda m: f"has no area inside {image(m)}", mend)
    good &= ~empty

    outside_px = np.maximum(-corners[:, :2], corners[:, 2:] - sizes_px).max(axis=1, initial=-1)
    cut = good & (outside_px > BORDER_TOLERANCE_PX + 1e-6)

    def reach(m: int) -> str:
        return f"reaches {outside_px[m]:.1f} px outside {image(m)}"

    mend = "correct the box or the image's width and height"
    tell("box_clipped", cut, reach, mend)
    tell("box_rounded", good & ~cut & (outside_px > _ROUNDING_PX), reach, mend)
    return boxes_xyxy, good, cut
