"""From what a format's reader found in its files to a checked data set.

Legend: M boxes of all images of a data set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import checks
from .errors import DataError
from .findings import Findings
from .records import Category, DetectionDataset, ImageRecord


@dataclass(frozen=True)
class ImageEntry:
    """An image whose entry is good and whose file is there."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass
class Columns:
    """The annotations of a data set, one list per field, before they are grouped by image."""

    ids: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)  # positions in the list of images
    labels: list[int] = field(default_factory=list)
    boxes_xywh: list[list[float]] = field(default_factory=list)  # pixels, finite
    crowd: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)  # nan: not given
    places: list[int] = field(default_factory=list)  # in their file; not every format needs it


def assemble(
    categories: tuple[Category, ...],
    images: list[ImageEntry],
    columns: Columns,
    folder: Path,
    describe: Callable[[int], str],
    findings: Findings,
) -> DetectionDataset:
    """Check the boxes and deal them to their images; an image's boxes keep their order.

    Args:
        categories: in the order of their ids.
        images: in the order of their ids, in the same order that `columns.images` counts.
        columns: M annotations.
        folder: what file names are relative to.
        describe: names box m, and its numbers as the file gives them.
        findings: is told of what can't be used.

    Raises:
        DataError: no image is left.
    """
    if not images:
        first = next((case.examples[0] for case in findings.cases.values()), f"{folder}: is empty.")
        raise DataError(f"none of the {findings.images} images can be used; the first: {first}")
    owners = np.array(columns.images, dtype=np.int64)
    boxes_xywh = np.array(columns.boxes_xywh, dtype=np.float64).reshape(-1, 4)
    sizes_px = np.array([(image.width, image.height) for image in images], dtype=np.float64)
    boxes_xyxy, good, cut = checks.check_boxes(boxes_xywh, sizes_px[owners], describe, findings)
    area = _areas(np.array(columns.area, dtype=np.float32), boxes_xyxy, cut)

    order = np.argsort(owners, kind="stable")
    order = order[good[order]]
    boxes_xyxy, area = boxes_xyxy[order], area[order]
    labels = np.array(columns.labels, dtype=np.int64)[order]
    crowd = np.array(columns.crowd, dtype=bool)[order]
    ids = [columns.ids[position] for position in order.tolist()]

    ends = np.cumsum(np.bincount(owners[order], minlength=len(images))).tolist()
    records = []
    start = 0
    for image, end in zip(images, ends, strict=True):
        records.append(
            ImageRecord(
                id=image.id,
                file_name=image.file_name,
                path=folder / image.file_name,
                width=image.width,
                height=image.height,
                boxes_xyxy=boxes_xyxy[start:end],
                labels=labels[start:end],
                crowd=crowd[start:end],
                area=area[start:end],
                annotation_ids=ids[start:end],
            )
        )
        start = end
    return DetectionDataset(categories, records, findings)


def _areas(given: np.ndarray, boxes_xyxy: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """The objects' areas, [M] float32: of their boxes where not given, at most those where cut."""
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    of_boxes = sides[:, 0] * sides[:, 1]
    areas = np.where(np.isnan(given), of_boxes, given)
    return np.where(cut, np.minimum(areas, of_boxes), areas)
