"""The annotation formats that `shard` reads, and the one call for all of them."""

from __future__ import annotations

from pathlib import Path

from .coco_format import read_coco
from .errors import DataError
from .findings import Findings
from .records import Category, DetectionDataset, ImageRecord
from .voc_format import read_voc
from .yolo_format import read_yolo

# The records are what other rooms take from here as well.
__all__ = [
    "FORMATS",
    "Category",
    "DetectionDataset",
    "ImageRecord",
    "read_coco",
    "read_dataset",
    "read_voc",
    "read_yolo",
]

FORMATS = ("coco", "voc", "yolo")


def read_dataset(
    annotation_format: str,
    annotations: Path,
    images: Path,
    classes: Path | None = None,
    chosen: Path | None = None,
    findings: Findings | None = None,
) -> DetectionDataset:
    """Read a data set of any format.

    Args:
        annotation_format: coco, voc or yolo.
        annotations: coco: the JSON file; voc, yolo: the folder of XML files or of labels.
        images: the folder of the images.
        classes: yolo, and if wanted voc: the file of class names.
        chosen: voc, yolo: a list of the images to take; None: all.
        findings: is told of what is repaired or left out; None: the first that must be is an
            error.

    Raises:
        DataError: an argument that the format doesn't have, or whatever the reader refuses.
    """
    if annotation_format == "coco":
        for option, value in (("--classes", classes), ("--list", chosen)):
            if value is not None:
                raise DataError(f"{option} {value}: a COCO file says so itself; leave it out.")
        return read_coco(annotations, images, findings)
    if annotation_format == "voc":
        return read_voc(annotations, images, classes, chosen, findings)
    if classes is None:
        raise DataError(
            f"{annotations}: YOLO labels have no class names; give the file of names, one a line, "
            "with --classes."
        )
    return read_yolo(annotations, images, classes, chosen, findings)
