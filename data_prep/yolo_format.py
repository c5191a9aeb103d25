"""A folder of YOLO label files to checked records.

Each image has a text file of its name with a line `class cx cy w h` for each object, in parts of
the image's width and height; a line with more numbers is a polygon, `class x1 y1 x2 y2 …`, whose
box is taken (YOLOv5's and Ultralytics' own data sets have such). An image without a file, or with
an empty one, is a picture without objects.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from . import checks
from .assemble import Columns, ImageEntry, assemble
from .class_list import read_class_names
from .errors import DataError, RefusedError
from .findings import Findings
from .image_header import stored_size
from .image_list import SUFFIXES, choose, files_below, read_image_list
from .records import Category, DetectionDataset


class _Line(NamedTuple):
    number: int  # in its file, from 1
    text: str


def read_yolo(
    labels: Path,
    images: Path,
    classes: Path,
    chosen: Path | None = None,
    findings: Findings | None = None,
) -> DetectionDataset:
    """Read a folder of YOLO label files and the sizes of its images, from their headers.

    Image ids count the images in the order of their names, from 1, and annotation ids the lines.
    Classes get the ids from 0 up, as in the labels.

    Args:
        labels: the folder of text files, with the same subfolders as `images`.
        images: the folder of the images.
        classes: a file with the class names (see `read_class_names`).
        chosen: a list of the images to take (`train.txt`); None: all.
        findings: is told of the images and lines that are repaired or left out; None: the first
            that must be is an error.

    Raises:
        DataError: a folder can't be listed; two images share a label file; no image can be used;
            and, if strict, whatever else is wrong.
    """
    labels, images, classes = Path(labels), Path(images), Path(classes)
    findings = Findings(strict=True) if findings is None else findings
    names = read_class_names(classes)
    label_files = _match(labels, images, classes, chosen, findings)
    entries, lines = _read_files(label_files, labels, images, findings)
    columns, texts = _columns(entries, lines, len(names), findings)

    def describe(m: int) -> str:
        return f"{lines[columns.images[m]][0]}: line {columns.places[m]}: {texts[m]!r}"

    categories = tuple(Category(number, name) for number, name in enumerate(names))
    return assemble(categories, entries, columns, images, describe, findings)


def _match(
    labels: Path, images: Path, classes: Path, chosen: Path | None, findings: Findings
) -> list[tuple[str, str | None]]:
    """Every image and its label file, both relative, sorted by image."""
    root, own = labels.resolve(), classes.resolve()
    texts = {
        name
        for name in files_below(labels, (".txt",), "YOLO label files")
        if name != "classes.txt" and root / name != own
    }
    names = files_below(images, SUFFIXES, "images")
    if chosen is not None:
        listed = read_image_list(Path(chosen))
        names, without_image = choose(names, listed)
        with_text, without_text = choose(texts, listed)
        texts, absent = set(with_text), without_image & without_text
        findings.images += len(absent)
        findings.add_all(
            "image_missing",
            sorted(absent),
            lambda name: f"{chosen}: {name!r} is not in {images}; restore it.",
        )
    if not names:
        raise DataError(f"{images}: has no image to read; give the folder of images.")
    wanted = [str(PurePosixPath(name).with_suffix(".txt")) for name in names]
    checks.refuse_twice(wanted, "label file of two images", labels)
    alone = sorted(texts - set(wanted))
    findings.images += len(names) + len(alone)
    findings.add_all(
        "image_missing",
        alone,
        lambda name: (
            f"{labels / name}: has no image of its name in {images}; "
            "give the right image folder or take the file away."
        ),
    )
    matches = [text if text in texts else None for text in wanted]
    return list(zip(names, matches, strict=True))


def _read_files(
    names: list[tuple[str, str | None]], labels: Path, images: Path, findings: Findings
) -> tuple[list[ImageEntry], list[tuple[Path, list[_Line]]]]:
    """The images that can be opened, and beside each its label file and the lines there."""
    entries, lines = [], []
    for number, (name, text) in enumerate(names, 1):
        path = labels / (text or "")
        try:
            found = _lines(path) if text is not None else []
            findings.annotations += len(found)
            width, height = stored_size(images / name)
        except RefusedError as error:
            findings.add(error.kind, str(error))
            continue
        entries.append(ImageEntry(number, name, width, height))
        lines.append((path, found))
    return entries, lines


def _lines(path: Path) -> list[_Line]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RefusedError(
            "label_file", f"{path}: the labels can't be read ({why}); write or fetch them again."
        ) from None
    lines = enumerate(text.splitlines(), 1)
    return [_Line(number, line.strip()) for number, line in lines if line.strip()]


def _columns(
    entries: list[ImageEntry],
    files: list[tuple[Path, list[_Line]]],
    class_count: int,
    findings: Findings,
) -> tuple[Columns, list[str]]:
    """The boxes of all lines that can be read, and the text of each."""
    columns = Columns()
    texts = []
    identity = 0
    for image, (entry, (path, lines)) in enumerate(zip(entries, files, strict=True)):
        for line in lines:
            identity += 1
            try:
                label, box = _parse(line, f"{path}: line {line.number}", class_count)
            except RefusedError as error:
                findings.add(error.kind, str(error))
                continue
            size = (entry.width, entry.height) * 2
            columns.ids.append(identity)
            columns.images.append(image)
            columns.labels.append(label)
            columns.boxes_xywh.append([part * px for part, px in zip(box, size, strict=True)])
            columns.crowd.append(False)
            columns.area.append(math.nan)
            columns.places.append(line.number)
            texts.append(checks.shown(line.text).strip("'"))
    return columns, texts


def _parse(line: _Line, where: str, class_count: int) -> tuple[int, list[float]]:
    """Class and box of a line: x, y, width, height, in parts of the image."""
    words = line.text.split()
    label = checks.number_px(words[0])
    if not label.is_integer():  # nan is none
        raise RefusedError(
            "annotation_entry",
            f"{where}: the class is {checks.shown(words[0])}; give a whole number.",
        )
    if not 0 <= label < class_count:
        raise RefusedError(
            "unknown_category",
            f"{where}: unknown class {label:.0f}, there are {class_count} from 0 to "
            f"{class_count - 1}; correct it or name the class.",
        )
    values = np.array([checks.number_px(word) for word in words[1:]])
    is_polygon = len(values) >= 6 and len(values) % 2 == 0
    if not (len(values) == 4 or is_polygon) or np.isnan(values).any():
        raise RefusedError(
            "box_values",
            f"{where}: {checks.shown(line.text)} is not a class and four finite numbers; "
            "give cx, cy, width and height in parts of the image, or remove the line.",
        )
    if is_polygon:
        points = values.reshape(-1, 2)
        low = points.min(axis=0)
        return int(label), [*low.tolist(), *(points.max(axis=0) - low).tolist()]
    cx, cy, width, height = values.tolist()
    return int(label), [cx - width / 2, cy - height / 2, width, height]
