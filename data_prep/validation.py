"""The validation set: every picture exactly once over all ranks, in one of two letterboxes.

*Square*: every picture in the same frame, as the detector was trained. *Rectangular*: pictures of
like shape share a batch, whose frame is hardly larger than they are; it is how YOLO's published
numbers are measured, and less grey to compute.

n pictures, N boxes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .augment import Picture
from .reader import SampleReader
from .stream import Batch, Letterbox, Truth, collate
from .workers import load

# Positions of the pictures of a batch, and height and width of their frame.
FramedBatch = tuple[list[int], tuple[int, int]]

STRIDE_PX = 32  # a frame's sides are multiples of the detectors' largest stride


class ValidationSet(Dataset[tuple[Picture, Any, Truth]]):
    """Pictures in frames of one size. Ranks may differ by one picture."""

    def __init__(
        self,
        reader: SampleReader,
        frame_px: tuple[int, int],
        letterbox: Letterbox,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.reader, self.frame_px, self.letterbox = reader, frame_px, letterbox
        self.positions = np.array_split(np.arange(len(reader)), world_size)[rank]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> tuple[Picture, Any, Truth]:
        sample = self.reader.decode(int(self.positions[i]))
        image, where = self.framed(i, sample.image)
        keep = ~sample.crowd
        picture = Picture(image, where.to_input(sample.boxes_xyxy[keep]), sample.labels[keep])
        height, width = sample.image.shape[:2]
        truth = Truth(
            sample.image_id,
            width,
            height,
            sample.boxes_xyxy,
            sample.labels,
            sample.crowd,
            sample.area,
        )
        return picture, where, truth

    def framed(self, i: int, image: np.ndarray) -> tuple[np.ndarray, Any]:
        """The i-th picture in its frame, and where it lies there."""
        return self.letterbox(image, *self.frame_px)


class RectangularSet(ValidationSet):
    """Pictures by shape, each in the frame of its batch; the same batches at any world size.

    Whole batches of a plan (`rectangular_batches`) are dealt to the ranks in turn, so ranks may
    differ by one batch. All are of one size but the very last: iterate with that batch size.
    """

    def __init__(
        self,
        reader: SampleReader,
        fit_px: tuple[int, int],
        letterbox: Letterbox,
        plan: Sequence[FramedBatch],
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(reader, fit_px, letterbox)
        own = plan[rank::world_size]
        self.positions = np.array([i for members, _ in own for i in members], dtype=np.int64)
        self.frames_px = [frame_px for members, frame_px in own for _ in members]

    def framed(self, i: int, image: np.ndarray) -> tuple[np.ndarray, Any]:
        """The i-th picture, as large as in the square frame, in the frame of its batch."""
        return self.letterbox(image, *self.frames_px[i], fit_px=self.frame_px)


def rectangular_batches(
    sizes_px: np.ndarray, fit_px: tuple[int, int], batch: int
) -> list[FramedBatch]:
    """Batches of like pictures, and the frame of each.

    Each picture is scaled to fit `fit_px`; the frame is the smallest multiple of the stride that
    holds all of the batch and half a stride more. That is YOLOv5's rule for its published numbers
    (pad .5), there for a square `fit_px` only.

    Pictures of equal shape come in the order that numpy's default sort gives them: which of them
    share a batch with larger ones was worth .004 AP on a hundred pictures with YOLOv5n, and of
    three orders tried this one gave upstream's numbers. It may differ between kinds of CPU, so
    one process makes the plan and the others follow it.

    Args:
        sizes_px: `[n, 2]` width and height.
        fit_px: height and width.
        batch: pictures in a batch.

    Returns:
        For each batch the positions of its pictures, and the frame's height and width.
    """
    # Python's whole numbers: a side that falls on half a stride must not hang on rounding.
    sizes = [(width, height) for width, height in sizes_px.tolist()]
    order: list[int] = np.argsort(sizes_px[:, 1] / sizes_px[:, 0]).tolist()
    plan = []
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        sides = [_sides(*sizes[i], *fit_px) for i in members]
        plan.append((members, (max(h for h, _ in sides), max(w for _, w in sides))))
    return plan


def _sides(width: int, height: int, fit_height: int, fit_width: int) -> tuple[int, int]:
    """Height and width of the smallest frame for one picture, in pixels."""
    # The scale is a fraction, of the side that fits more tightly.
    tall = fit_height * width <= fit_width * height
    above, below = (fit_height, height) if tall else (fit_width, width)
    # side · scale / stride + 1/2, rounded up
    height, width = (
        STRIDE_PX * -(-(2 * side * above + STRIDE_PX * below) // (2 * STRIDE_PX * below))
        for side in (height, width)
    )
    return height, width


def validation_batches(data: ValidationSet, batch: int, workers: int) -> Iterator[Batch]:
    """Iterates the validation pictures of this rank in order."""
    return load(data, workers, batch_size=batch, collate_fn=_collate)


def _collate(items: Sequence[tuple[Picture, Any, Truth]]) -> Batch:
    pictures, frames, truth = zip(*items, strict=True)
    batch = collate(pictures, [t.image_id for t in truth])
    return replace(batch, frames=tuple(frames), truth=tuple(truth))
