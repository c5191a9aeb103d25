"""What a data set is made of, from its annotations alone: classes, box sizes, crowding.

Legend: n pictures, N boxes of all pictures, C classes. Crowds, which training leaves out, are
counted apart and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data_prep.errors import CorruptSampleError
from ..data_prep.reader import ShardReader
from ..data_prep.records import Category

SMALL_PX, MEDIUM_PX = 32, 96  # COCO's borders between small, medium and large: roots of areas
_PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True, eq=False)
class DataStatistics:
    """The statistics of a data set whose pictures are fitted into a frame."""

    classes: tuple[Category, ...]
    frame_px: tuple[int, int]  # height, width
    pictures: int  # n, those that can be read
    unreadable: int  # samples
    crowds: int
    class_boxes: np.ndarray  # [C] int64
    class_pictures: np.ndarray  # [C] int64, pictures with a box of the class
    sides_px: np.ndarray  # [N] float64, root of a box's area in pixels of the frame
    boxes_per_picture: np.ndarray  # [n] int64

    @property
    def boxes(self) -> int:
        """N."""
        return len(self.sides_px)

    @property
    def empty_pictures(self) -> int:
        """How many pictures have no box."""
        return int((self.boxes_per_picture == 0).sum())

    def size_counts(self) -> dict[str, int]:
        """How many boxes are small, medium and large in the frame, by COCO's borders."""
        small, not_large = ((self.sides_px < border).sum() for border in (SMALL_PX, MEDIUM_PX))
        counts = (small, not_large - small, self.boxes - not_large)
        return dict(zip(("small", "medium", "large"), map(int, counts), strict=True))

    def document(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        crowding = self.boxes_per_picture
        return {
            "pictures": self.pictures,
            "empty_pictures": self.empty_pictures,
            "unreadable_samples": self.unreadable,
            "boxes": self.boxes,
            "crowds": self.crowds,
            "classes": [
                {"id": c.id, "name": c.name, "boxes": int(boxes), "pictures": int(pictures)}
                for c, boxes, pictures in zip(
                    self.classes, self.class_boxes, self.class_pictures, strict=True
                )
            ],
            "box_side_px": {
                "frame_px": list(self.frame_px),
                **self.size_counts(),
                "percentiles": _percentiles(self.sides_px),
            },
            "boxes_per_picture": {
                "mean": round(float(crowding.mean()), 3) if self.pictures else None,
                "max": int(crowding.max(initial=0)),
                "percentiles": _percentiles(crowding),
            },
        }

    def table(self) -> str:
        """A few lines for the terminal; of many classes the ends of the list."""
        sizes = ", ".join(f"{count} {name}" for name, count in self.size_counts().items())
        lines = [
            f"{self.pictures} pictures ({self.empty_pictures} without boxes), {self.boxes} boxes "
            f"of {len(self.classes)} classes, {self.crowds} crowds",
            f"boxes in the frame of {self.frame_px[1]}x{self.frame_px[0]} px: {sizes}; "
            f"root of area {_spread(self.sides_px)} px",
            f"boxes in a picture: {_spread(self.boxes_per_picture)}",
        ]
        if self.unreadable:
            lines.append(f"{self.unreadable} samples can't be read: see `convnext-yolo verify`")
        order = np.argsort(-self.class_boxes, kind="stable").tolist()
        shown = order if len(order) <= 12 else [*order[:8], None, *order[-3:]]
        width = max(len(self.classes[i].name) for i in shown if i is not None)
        lines.append(f"{'class':{width}}  {'boxes':>8}  {'pictures':>8}")
        for i in shown:
            if i is None:
                lines.append(f"… {len(order) - len(shown) + 1} classes")
                continue
            name = self.classes[i].name
            lines.append(f"{name:{width}}  {self.class_boxes[i]:8}  {self.class_pictures[i]:8}")
        return "\n".join(lines)


def data_statistics(
    reader: ShardReader, frame_px: tuple[int, int], progress: bool = True
) -> DataStatistics:
    """Reads all annotations of a data set; no picture is decoded.

    Args:
        reader: the data set.
        frame_px: height and width that pictures are fitted into, smaller ones enlarged.
        progress: show a bar on stderr if it takes longer.

    Raises:
        DataError: a shard is missing.
    """
    from tqdm import tqdm

    counts, sides, pictures_with = [], [np.zeros(0)], np.zeros(len(reader.classes), np.int64)
    labels = [np.zeros(0, np.int64)]
    crowds = unreadable = 0
    for position in tqdm(
        range(len(reader)), "annotations", unit="img", delay=2, disable=not progress
    ):
        try:
            _, annotations = reader.read(position)
            its_labels, its_sides, its_crowds = _boxes_of(annotations, frame_px)
            pictures_with[np.unique(its_labels)] += 1
        except (CorruptSampleError, KeyError, TypeError, ValueError, IndexError):
            unreadable += 1
            continue
        counts.append(len(its_labels))
        labels.append(its_labels)
        sides.append(its_sides)
        crowds += its_crowds
    return DataStatistics(
        classes=reader.classes,
        frame_px=frame_px,
        pictures=len(counts),
        unreadable=unreadable,
        crowds=crowds,
        class_boxes=np.bincount(np.concatenate(labels), minlength=len(reader.classes)),
        class_pictures=pictures_with,
        sides_px=np.concatenate(sides),
        boxes_per_picture=np.array(counts, np.int64),
    )


def _boxes_of(
    annotations: dict[str, Any], frame_px: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels [N] and sides in the frame [N] of a picture's boxes, and how many are crowds."""
    crowd = np.array(annotations["crowd"], bool)
    boxes = np.array(annotations["boxes"], np.float64).reshape(-1, 4)[~crowd]
    scale = min(frame_px[0] / annotations["height"], frame_px[1] / annotations["width"])
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) * scale
    return np.array(annotations["labels"], np.int64)[~crowd], sides, int(crowd.sum())


def _percentiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.percentile(values, _PERCENTILES).tolist()
    return {str(p): round(value, 3) for p, value in zip(_PERCENTILES, found, strict=True)}


def _spread(values: Sequence[float] | np.ndarray) -> str:
    if not len(values):
        return "none"
    low, middle, high = np.percentile(values, (5, 50, 95))
    return f"median {middle:.0f} (5 % {low:.0f}, 95 % {high:.0f}, largest {np.max(values):.0f})"
