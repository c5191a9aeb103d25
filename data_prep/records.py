"""What every reader of a format gives: checked records.

Legend: N boxes of one image. Boxes are xyxy in pixels, from the top left corner of the *stored*
picture (an EXIF rotation is not applied); sizes are width, height in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .findings import Findings


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
    crowd: np.ndarray  # [N] bool: neither to be found nor a mistake to find
    area: np.ndarray  # [N] float32, square pixels, of the object (COCO: of its mask)
    annotation_ids: list[int]


@dataclass(frozen=True, eq=False)
class DetectionDataset:
    """Categories in the order of their ids, images in the order of theirs."""

    categories: tuple[Category, ...]
    images: list[ImageRecord]
    findings: Findings = field(default_factory=Findings)  # what was repaired or left out
