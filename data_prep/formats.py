"""Annotations to checked records: what every later step may rely on.

Legend: N boxes of one image. Boxes are xyxy in pixels, from the top left corner of the *stored*
picture (an EXIF rotation is not applied); sizes are width, height in pixels.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from . import checks
from .errors import DataError


@dataclass(frozen=True)
class Category:
    """A class of objects: the data set's own id (sparse in COCO) and its name."""

    id: int
    name: str


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and its boxes, checked: every field agrees with every other."""

    id: int
    file_name: str  # as written in the annotations, relative to the image folder
    path: Path
    width: int
    height: int
    boxes_xyxy: np.ndarray  # [N, 4] float32, inside the image, x1 < x2 and y1 < y2
    labels: np.ndarray  # [N] int64, index into the data set's categories
    crowd: np.ndarray  # [N] bool
    area: np.ndarray  # [N] float32, square pixels, of the object (COCO: of its mask)
    annotation_ids: list[int]


@dataclass(frozen=True, eq=False)
class DetectionDataset:
    """Categories in the order of their ids, images in the order of theirs."""

    categories: tuple[Category, ...]
    images: list[ImageRecord]
    clipped_boxes: int = 0  # boxes that crossed the border by at most 1 px
    dropped_boxes: int = 0  # annotations with a width or height of zero, which COCO itself has


@dataclass
class _ImageEntry:
    id: int
    file_name: str
    width: int
    height: int


@dataclass
class _Columns:
    """The annotations of a file, one list per field, before they are grouped by image."""

    ids: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)  # positions in the list of images
    labels: list[int] = field(default_factory=list)
    boxes_xywh: list[list[float]] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)  # nan: not given


def read_coco(annotations: Path, images: Path) -> DetectionDataset:
    """Read a COCO instances file and check it against its image folder.

    No image is opened: only the folders are listed. Images without annotations are kept.

    Args:
        annotations: the JSON file with `images`, `annotations` and `categories`.
        images: the folder that the images' `file_name`s are relative to.

    Raises:
        DataError: the file can't be read or isn't COCO; an image is missing, listed twice or
            outside the folder; an annotation has an unknown image or category, or a box that is
            not finite, has a negative side, or lies more than 1 px outside its image.
    """
    annotations, images = Path(annotations), Path(images)
    document = _read_json(annotations)
    categories = _read_categories(document["categories"], annotations)
    entries = _read_images(document["images"], annotations, images)
    columns = _read_annotations(document["annotations"], annotations, entries, categories)
    dropped = _drop_empty(columns)
    boxes_xyxy, clipped = _check_boxes(columns, annotations, entries)
    records = _group(columns, boxes_xyxy, entries, images)
    return DetectionDataset(categories, records, clipped, dropped)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: the annotations can't be read ({error.strerror}); "
            "give the path of a COCO-format JSON file."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: the annotations are not valid JSON ({error}); write or fetch the file again."
        ) from None
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: holds a JSON {type(document).__name__}, not an object with images, "
            "annotations and categories; give the instances file, not a results file."
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            what = "is not a list" if key in document else "is missing"
            raise DataError(
                f"{path}: {key} {what}; a COCO file has the lists images, annotations "
                "and categories."
            )
    return document


def _object(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: is {checks.shown(entry)}, not an object; correct or remove it.")
    return entry


def _read_categories(entries: list[Any], path: Path) -> tuple[Category, ...]:
    categories = []
    for position, entry in enumerate(entries):
        where = f"{path}: categories[{position}]"
        name = _object(entry, where).get("name")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: name is {checks.shown(name)}; give the category a name.")
        categories.append(Category(checks.identifier(entry, "id", where), name))
    if not categories:
        raise DataError(f"{path}: categories is empty; list the classes to be detected.")
    checks.refuse_twice((category.id for category in categories), "category id", path)
    # Per-class results are reported by name, where a second one would overwrite the first.
    checks.refuse_twice((category.name for category in categories), "category name", path)
    return tuple(sorted(categories, key=lambda category: category.id))


def _read_images(entries: list[Any], path: Path, folder: Path) -> list[_ImageEntry]:
    """The image entries in the order of their ids, all of their files present."""
    if not entries:
        raise DataError(f"{path}: images is empty; list the images to be read.")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder; give the folder of {path.name}'s images.")
    images, names = [], []
    for position, entry in enumerate(entries):
        where = f"{path}: images[{position}]"
        identity = checks.identifier(_object(entry, where), "id", where)
        where = f"{path}: image {identity}"
        names.append(checks.inside(entry.get("file_name"), where))
        width = checks.size_px(entry, "width", where)
        height = checks.size_px(entry, "height", where)
        images.append(_ImageEntry(identity, entry["file_name"], width, height))
    checks.refuse_twice((image.id for image in images), "image id", path)
    checks.refuse_twice(names, "file_name", path)
    checks.refuse_missing_files(names, folder, path)
    return sorted(images, key=lambda image: image.id)


def _read_annotations(
    entries: list[Any], path: Path, images: list[_ImageEntry], categories: tuple[Category, ...]
) -> _Columns:
    image_of = {image.id: position for position, image in enumerate(images)}
    label_of = {category.id: label for label, category in enumerate(categories)}
    columns = _Columns()
    for position, entry in enumerate(entries):
        where = f"{path}: annotations[{position}]"
        identity = checks.identifier(_object(entry, where), "id", where)
        where = f"{path}: annotation {identity}"
        image_id = checks.identifier(entry, "image_id", where)
        if image_id not in image_of:
            raise DataError(
                f"{where}: image_id {image_id} is not among the images; "
                "add the image or remove the annotation."
            )
        category_id = checks.identifier(entry, "category_id", where)
        if category_id not in label_of:
            raise DataError(
                f"{where}: unknown category_id {category_id}, the file lists {len(label_of)} "
                f"categories from {categories[0].id} to {categories[-1].id}; "
                "correct it or add the category."
            )
        columns.ids.append(identity)
        columns.images.append(image_of[image_id])
        columns.labels.append(label_of[category_id])
        columns.boxes_xywh.append(checks.box_xywh(entry, where))
        columns.crowd.append(_crowd(entry, where))
        columns.area.append(_area(entry, where))
    # pycocotools keeps annotations by id: a second one would silently replace the first.
    checks.refuse_twice(columns.ids, "annotation id", path)
    return columns


def _crowd(entry: dict[str, Any], where: str) -> bool:
    value = entry.get("iscrowd", 0)
    if value not in (0, 1):
        raise DataError(f"{where}: iscrowd is {checks.shown(value)}; give 0 or 1.")
    return bool(value)


def _area(entry: dict[str, Any], where: str) -> float:
    value = entry.get("area")
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not 0 <= value < 1e18:  # False for nan too
        raise DataError(
            f"{where}: area is {checks.shown(value)}; give it in square pixels, "
            "or leave it out for the area of the box."
        )
    return float(value)


def _drop_empty(columns: _Columns) -> int:
    """Takes annotations without width or height out: no box can be learnt or found there."""
    keep = [m for m, box in enumerate(columns.boxes_xywh) if box[2] and box[3]]
    dropped = len(columns.boxes_xywh) - len(keep)
    if dropped:
        for column in fields(columns):
            values = getattr(columns, column.name)
            setattr(columns, column.name, [values[m] for m in keep])
    return dropped


def _check_boxes(
    columns: _Columns, path: Path, images: list[_ImageEntry]
) -> tuple[np.ndarray, int]:
    def where(m: int) -> str:
        image = images[columns.images[m]]
        return f"{path}: annotation {columns.ids[m]} of image {image.file_name!r}"

    boxes_xywh = np.array(columns.boxes_xywh, dtype=np.float64).reshape(-1, 4)
    sizes_px = np.array([(image.width, image.height) for image in images], dtype=np.float64)
    return checks.check_boxes(boxes_xywh, sizes_px[np.array(columns.images, np.int64)], where)


def _group(
    columns: _Columns, boxes_xyxy: np.ndarray, images: list[_ImageEntry], folder: Path
) -> list[ImageRecord]:
    """Deal the columns to their images; an image's boxes keep the order of the file."""
    owners = np.array(columns.images, dtype=np.int64)
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    area = np.array(columns.area, dtype=np.float32)
    area = np.where(np.isnan(area), sides[:, 0] * sides[:, 1], area)

    order = np.argsort(owners, kind="stable")
    boxes_xyxy, area = boxes_xyxy[order], area[order]
    labels = np.array(columns.labels, dtype=np.int64)[order]
    crowd = np.array(columns.crowd, dtype=bool)[order]
    ids = [columns.ids[position] for position in order.tolist()]

    ends = np.cumsum(np.bincount(owners, minlength=len(images))).tolist()
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
    return records
