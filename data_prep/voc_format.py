"""A folder of Pascal VOC XML files to checked records.

VOC counts pixels from 1 and both corners of a box belong to it (the development kit of VOC 2012,
section "Annotation": the top left pixel is (1, 1)), so a box becomes x from xmin - 1 to xmax. Tools
that write VOC from 0 give boxes that are half a pixel wrong in this reading, and no worse. An
object that is `difficult` counts neither as found nor as missed there (Everingham et al., "The
Pascal Visual Object Classes Challenge", IJCV 2010, section 4.2): it becomes a crowd box, with which
evaluation deals in the same way.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from . import checks
from .assemble import Columns, ImageEntry, assemble
from .class_list import read_class_names
from .errors import DataError, RefusedError
from .findings import Findings
from .image_header import stored_size
from .image_list import SUFFIXES, choose, files_below, read_image_list
from .records import Category, DetectionDataset

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    name: str
    corners: list[float]  # as in the file; nan where it has no number
    difficult: bool


class _File(NamedTuple):
    id: int
    xml: str
    image: ImageEntry
    objects: list[_Object]


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses document types, and so entities that could expand without end. VOC has none."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type, which could define entities")


def read_voc(
    annotations: Path,
    images: Path,
    classes: Path | None = None,
    chosen: Path | None = None,
    findings: Findings | None = None,
) -> DetectionDataset:
    """Read a folder of VOC XML files and check it against its image folder.

    Image ids count the XML files in the order of their names, from 1, and annotation ids the
    objects. Classes get the ids from 1 up.

    Args:
        annotations: the folder (`Annotations`), searched with its subfolders.
        images: the folder of the images (`JPEGImages`).
        classes: a file with the class names (see `read_class_names`); None: all names in the
            files, sorted.
        chosen: a list of the images to take (`ImageSets/Main/train.txt`); None: all.
        findings: is told of the images and objects that are repaired or left out; None: the first
            that must be is an error.

    Raises:
        DataError: a folder can't be listed; an image has two XML files; no image can be used;
            and, if strict, whatever else is wrong.
    """
    annotations, images = Path(annotations), Path(images)
    findings = Findings(strict=True) if findings is None else findings
    names = read_class_names(Path(classes)) if classes is not None else None
    files = _read_files(annotations, images, chosen, findings)
    if names is None:
        names = sorted({thing.name for file in files for thing in file.objects if thing.name})
    if files and not names:
        raise DataError(f"{annotations}: no object has a name; name the classes with --classes.")
    categories = tuple(Category(number, name) for number, name in enumerate(names, 1))
    columns = _columns(files, names, annotations, findings)

    def describe(m: int) -> str:
        file, number = files[columns.images[m]], columns.places[m]
        numbers = ", ".join(f"{v:g}" for v in file.objects[number].corners)
        return f"{annotations / file.xml}: object {number + 1}: bndbox [{numbers}]"

    entries = [file.image for file in files]
    return assemble(categories, entries, columns, images, describe, findings)


def _read_files(folder: Path, images: Path, chosen: Path | None, findings: Findings) -> list[_File]:
    """All files whose image is there, in the order of their ids."""
    xmls = files_below(folder, (".xml",), "VOC XML files")
    if chosen is not None:
        xmls, absent = choose(xmls, read_image_list(Path(chosen)))
        findings.add_all(
            "image_missing",
            sorted(absent),
            lambda name: f"{chosen}: {name!r} has no XML file in {folder}; restore it.",
        )
        findings.images += len(absent)
    if not xmls:
        raise DataError(f"{folder}: has no XML file to read; give the folder of annotations.")
    findings.images += len(xmls)
    there = set(files_below(images, SUFFIXES, "images"))
    files = []
    for number, xml in enumerate(xmls, 1):
        try:
            files.append(_read_file(number, folder, xml, images, there, findings))
        except RefusedError as error:
            findings.add(error.kind, str(error))
    checks.refuse_twice((file.image.file_name for file in files), "filename", folder)
    return files


def _read_file(
    number: int, folder: Path, xml: str, images: Path, there: set[str], findings: Findings
) -> _File:
    path = folder / xml
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        why = getattr(error, "strerror", None) or error
        raise RefusedError(
            "label_file", f"{path}: can't be read as XML ({why}); write or fetch it again."
        ) from None
    objects = [_object(entry) for entry in root.findall("object")]
    findings.annotations += len(objects)
    name = _image_name(root, path, images, there, findings)
    width, height = _size(root, path, images / name, findings)
    return _File(number, xml, ImageEntry(number, name, width, height), objects)


def _object(entry: ElementTree.Element) -> _Object:
    corners = [checks.number_px(entry.findtext(f"bndbox/{corner}")) for corner in _CORNERS]
    difficult = (entry.findtext("difficult") or "0").strip() == "1"
    return _Object((entry.findtext("name") or "").strip(), corners, difficult)


def _image_name(
    root: ElementTree.Element, path: Path, images: Path, there: set[str], findings: Findings
) -> str:
    """The image's file: as the XML says, else that of the XML's own name, as renaming leaves it."""
    given = (root.findtext("filename") or "").strip()
    if given in there:
        return given
    for suffix in SUFFIXES:
        for name in (path.stem + suffix, path.stem + suffix.upper()):
            if name in there:
                findings.add(
                    "image_name",
                    f"{path}: filename {checks.shown(given)} is not in {images}; "
                    f"correct it, perhaps to {name!r}.",
                )
                return name
    raise RefusedError(
        "image_missing",
        f"{path}: the image {checks.shown(given)} is not in {images}; "
        "give the right image folder or take the file away.",
    )


def _size(
    root: ElementTree.Element, path: Path, image: Path, findings: Findings
) -> tuple[int, int]:
    values = [checks.number_px(root.findtext(f"size/{key}")) for key in ("width", "height")]
    if any(math.isnan(value) or value == 0 for value in values):
        size = stored_size(image)
        findings.add(
            "size_missing", f"{path}: has no size; give width and height, {size[0]} and {size[1]}."
        )
        return size
    if any(value < 1 or not value.is_integer() for value in values):
        raise RefusedError(
            "image_entry",
            f"{path}: size is {values[0]:g}x{values[1]:g}; give whole numbers of pixels.",
        )
    return int(values[0]), int(values[1])


def _columns(files: list[_File], names: list[str], folder: Path, findings: Findings) -> Columns:
    label_of = {name: label for label, name in enumerate(names)}
    columns = Columns()
    identity = 0
    for image, file in enumerate(files):
        for number, thing in enumerate(file.objects):
            identity += 1
            where = f"{folder / file.xml}: object {number + 1}"
            if thing.name not in label_of:
                findings.add(
                    "unknown_category",
                    f"{where}: name is {checks.shown(thing.name)}, which is not among the "
                    f"{len(names)} classes; correct it or add the class.",
                )
                continue
            if any(math.isnan(value) for value in thing.corners):
                findings.add(
                    "box_values",
                    f"{where}: bndbox is not four finite numbers; "
                    "give xmin, ymin, xmax and ymax in pixels.",
                )
                continue
            x1, y1, x2, y2 = thing.corners
            columns.ids.append(identity)
            columns.images.append(image)
            columns.labels.append(label_of[thing.name])
            columns.boxes_xywh.append([x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1])
            columns.crowd.append(thing.difficult)
            columns.area.append(math.nan)
            columns.places.append(number)
    return columns
