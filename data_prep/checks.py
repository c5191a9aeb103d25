"""Checks that every annotation format shares: ids, file names, image files, boxes.

Legend: M boxes of all images of a data set. Each check raises a DataError whose sentence begins
with `where`: the file and the entry in it.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError

# A box may cross the border by this much and is clipped: annotation tools count pixels from 0 or
# from 1 and round. Further outside, the box or the image size is wrong, and nobody can tell which.
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
    """The four finite numbers under `bbox`."""
    box = entry.get("bbox")
    # The comparison is False for nan as well; and numpy would take strings for numbers.
    if (
        isinstance(box, list)
        and len(box) == 4
        and all(type(v) in (int, float) and abs(v) < _COORDINATE_LIMIT_PX for v in box)
    ):
        return box
    raise DataError(
        f"{where}: {_found(entry, 'bbox')}; give four finite numbers x, y, width, height "
        "in pixels, or remove the annotation."
    )


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


def refuse_missing_files(names: list[str], folder: Path, path: Path) -> None:
    """Refuse names that are not files in `folder`.

    Each folder is listed once: 118,000 single look-ups take minutes on a network file system.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, base = posixpath.split(name)
        if parent not in listed:
            listed[parent] = _files_in(folder / parent)
        if base not in listed[parent]:
            missing.append(name)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"{path}: the image {shown(missing[0])}{others} is not in {folder}; "
            "give the right image folder or take the image out of the annotations."
        )


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
    boxes_xywh: np.ndarray, sizes_px: np.ndarray, where: Callable[[int], str]
) -> tuple[np.ndarray, int]:
    """Turn all boxes into xyxy inside their images.

    Args:
        boxes_xywh: [M, 4] float64, finite.
        sizes_px: [M, 2] float64, width and height of each box's image.
        where: names box m for the sentence.

    Returns:
        boxes [M, 4] float32 xyxy, and how many crossed the border (by at most 1 px) and were
        clipped to it.

    Raises:
        DataError: a box has a side <= 0, or lies more than 1 px outside its image.
    """

    def refuse(bad: np.ndarray, what: Callable[[int], str], mend: str) -> None:
        if bad.any():
            m = int(bad.argmax())
            others = f" (and {int(bad.sum()) - 1} more like it)" if bad.sum() > 1 else ""
            numbers = ", ".join(f"{v:g}" for v in boxes_xywh[m])
            raise DataError(f"{where(m)}: bbox [{numbers}] {what(m)}{others}; {mend}.")

    def image(m: int) -> str:
        return f"the {sizes_px[m, 0]:.0f}x{sizes_px[m, 1]:.0f} image"

    side = boxes_xywh[:, 2:].min(axis=1)
    mend = "correct it (x, y, width, height) or remove the annotation"
    refuse(side < 0, lambda m: "has a negative width or height", mend)
    refuse(side == 0, lambda m: "has a width or height of zero", mend)

    corners = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
    outside = np.maximum(-corners[:, :2], corners[:, 2:] - sizes_px).max(axis=1)
    refuse(
        outside > BORDER_TOLERANCE_PX + 1e-6,
        lambda m: f"reaches {outside[m]:.1f} px outside {image(m)}",
        "correct the box or the image's width and height",
    )
    limit = np.concatenate([sizes_px, sizes_px], axis=1)
    boxes_xyxy = np.clip(corners, 0, limit).astype(np.float32)
    # float32 as well as clipping can leave nothing: 1e-6 px at x = 600, or a box on the border.
    empty = (boxes_xyxy[:, 2:] <= boxes_xyxy[:, :2]).any(axis=1)
    refuse(empty, lambda m: f"has no area inside {image(m)}", mend)
    return boxes_xyxy, int((outside > _ROUNDING_PX).sum())
