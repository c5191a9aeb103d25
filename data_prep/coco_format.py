"""COCO instances files (https://cocodataset.org/#format-data) to checked records."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from . import checks
from .assemble import Columns, ImageEntry, assemble
from .errors import DataError, RefusedError
from .findings import Findings
from .records import Category, DetectionDataset


def read_coco(
    annotations: Path, images: Path, findings: Findings | None = None
) -> DetectionDataset:
    """Read a COCO instances file and check it against its image folder.

    No image is opened: only the folders are listed. Images without annotations are kept. Boxes
    over the border by at most 1 px are clipped and those without area left out, as COCO itself
    has such.

    Args:
        annotations: the JSON file with `images`, `annotations` and `categories`.
        images: the folder that the images' `file_name`s are relative to.
        findings: is told of the images and annotations that are repaired or left out; None: the
            first that must be is an error.

    Raises:
        DataError: the file can't be read or isn't COCO; an image id or file name is listed twice;
            no image can be used; and, if strict, whatever else is wrong.
    """
    annotations, images = Path(annotations), Path(images)
    findings = Findings(strict=True) if findings is None else findings
    document = _read_json(annotations)
    categories = _read_categories(document["categories"], annotations)
    entries, refused_ids = _read_images(document["images"], annotations, images, findings)
    columns = _read_annotations(
        document["annotations"], annotations, entries, refused_ids, categories, findings
    )

    def describe(m: int) -> str:
        name = entries[columns.images[m]].file_name
        numbers = ", ".join(f"{v:g}" for v in columns.boxes_xywh[m])
        return f"{annotations}: annotation {columns.ids[m]} of image {name!r}: bbox [{numbers}]"

    return assemble(categories, entries, columns, images, describe, findings)


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


def _read_images(
    entries: list[Any], path: Path, folder: Path, findings: Findings
) -> tuple[list[ImageEntry], set[int]]:
    """The good images in the order of their ids, all of their files present; and others' ids."""
    if not entries:
        raise DataError(f"{path}: images is empty; list the images to be read.")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder; give the folder of {path.name}'s images.")
    findings.images = len(entries)
    ids, images, names = [], [], []
    for position, entry in enumerate(entries):
        where = f"{path}: images[{position}]"
        try:
            identity = checks.identifier(_object(entry, where), "id", where)
            ids.append(identity)
            where = f"{path}: image {identity}"
            name = checks.inside(entry.get("file_name"), where)
            width = checks.size_px(entry, "width", where)
            height = checks.size_px(entry, "height", where)
        except DataError as error:
            findings.add("image_entry", str(error))
            continue
        names.append(name)
        images.append(ImageEntry(identity, entry["file_name"], width, height))
    checks.refuse_twice(ids, "image id", path)
    checks.refuse_twice(names, "file_name", path)
    there = checks.files_there(names, folder)
    findings.add_all(
        "image_missing",
        itertools.compress(names, (not found for found in there)),
        lambda name: (
            f"{path}: the image {checks.shown(name)} is not in {folder}; "
            "give the right image folder or take the image out of the annotations."
        ),
    )
    kept = sorted(itertools.compress(images, there), key=lambda image: image.id)
    return kept, set(ids) - {image.id for image in kept}


def _read_annotations(
    entries: list[Any],
    path: Path,
    images: list[ImageEntry],
    refused_ids: Collection[int],
    categories: tuple[Category, ...],
    findings: Findings,
) -> Columns:
    image_of = {image.id: position for position, image in enumerate(images)}
    label_of = {category.id: label for label, category in enumerate(categories)}
    columns = Columns()
    findings.annotations = len(entries)
    no_ids = 0
    for position, entry in enumerate(entries):
        where = f"{path}: annotations[{position}]"
        try:
            try:
                identity = checks.identifier(_object(entry, where), "id", where)
                where = f"{path}: annotation {identity}"
            except DataError as error:
                if not isinstance(entry, dict):
                    raise
                findings.add("annotation_id", str(error))
                no_ids -= 1
                identity = no_ids
            image_id = checks.identifier(entry, "image_id", where)
            if image_id in refused_ids:
                continue  # goes with its image
            image = _image(image_id, image_of, where)
            label = _label(entry, label_of, categories, where)
            box = checks.box_xywh(entry, where)
            crowd = _crowd(entry, where)
        except RefusedError as error:
            findings.add(error.kind, str(error))
            continue
        except DataError as error:
            findings.add("annotation_entry", str(error))
            continue
        columns.ids.append(identity)
        columns.images.append(image)
        columns.labels.append(label)
        columns.boxes_xywh.append(box)
        columns.crowd.append(crowd)
        columns.area.append(_area(entry, where, findings))
    columns.ids = _distinct(columns.ids, path, findings)
    return columns


def _image(image_id: int, image_of: dict[int, int], where: str) -> int:
    if image_id not in image_of:
        raise RefusedError(
            "unknown_image",
            f"{where}: image_id {image_id} is not among the images; "
            "add the image or remove the annotation.",
        )
    return image_of[image_id]


def _label(
    entry: dict[str, Any], label_of: dict[int, int], categories: tuple[Category, ...], where: str
) -> int:
    category_id = checks.identifier(entry, "category_id", where)
    if category_id not in label_of:
        raise RefusedError(
            "unknown_category",
            f"{where}: unknown category_id {category_id}, the file lists {len(label_of)} "
            f"categories from {categories[0].id} to {categories[-1].id}; "
            "correct it or add the category.",
        )
    return label_of[category_id]


def _crowd(entry: dict[str, Any], where: str) -> bool:
    value = entry.get("iscrowd", 0)
    if value not in (0, 1):
        raise DataError(f"{where}: iscrowd is {checks.shown(value)}; give 0 or 1.")
    return bool(value)


def _area(entry: dict[str, Any], where: str, findings: Findings) -> float:
    value = entry.get("area")
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not 0 <= value < 1e18:  # False for nan too
        findings.add(
            "area",
            f"{where}: area is {checks.shown(value)}; give it in square pixels, "
            "or leave it out for the area of the box.",
        )
        return math.nan
    return float(value)


def _distinct(ids: list[int], path: Path, findings: Findings) -> list[int]:
    """The ids, but a second one of the same number, and those not given (< 0), made new.

    pycocotools keeps annotations by id: a second one would silently replace the first.
    """
    taken = set(ids)
    if len(taken) == len(ids) and min(ids, default=0) >= 0:
        return ids
    if findings.strict:
        checks.refuse_twice(ids, "annotation id", path)
    free = (number for number in itertools.count(1) if number not in taken)
    seen: set[int] = set()
    distinct, again = [], []
    for identity in ids:
        if identity in seen:
            again.append(identity)
        new = next(free) if identity < 0 or identity in seen else identity
        seen.add(identity)
        distinct.append(new)
    findings.add_all(
        "annotation_id",
        again,
        lambda number: (
            f"{path}: the annotation id {number} is given again; give each annotation its own."
        ),
    )
    return distinct
