"""The validation set: every picture exactly once over all ranks, in one of two letterboxes.

*Square*: every picture in the same frame, as the detector was trained. *Rectangular*: pictures of
like shape share a batch, whose frame is hardly larger than they are; it is how YOLO's published
numbers are measured, and less grey to compute.

n pictures, N boxes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .augment import FILL
from .batch import Batch, Corrupt, Truth, make_batch
from .errors import CorruptSampleError
from .reader import Sample, SampleReader
from .workers import load

# Positions of the pictures of a batch, and height and width of their frame.
FramedBatch = tuple[list[int], tuple[int, int]]

# Scales a picture [H, W, 3] into a frame and tells where it lies there: `model.letterbox`,
# passed in because rooms do not import each other.
Letterbox = Callable[..., tuple[np.ndarray, Any]]

STRIDE_PX = 32  # a frame's sides are multiples of the detectors' largest stride


@dataclass(frozen=True)
class Framed:
    """One validation picture. N boxes, crowds left out."""

    image: np.ndarray  # [H, W, 3] uint8, the frame
    where: Any  # the picture lies in it
    boxes_xyxy: np.ndarray  # [N, 4] float32, pixels of the frame
    labels: np.ndarray  # [N]
    truth: Truth
    corrupt: Corrupt | None


class ValidationSet(Dataset[Framed]):
    """Pictures in frames of one size. Ranks may differ by one picture.

    A corrupt one is a grey frame without objects, so that every rank sees as many as it expects.
    """

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

    def __getitem__(self, i: int) -> Framed:
        try:
            sample, corrupt = self.reader.decode(int(self.positions[i])), None
        except CorruptSampleError as error:
            sample = _nothing(int(error.key))
            corrupt = Corrupt(error.shard, error.key, error.reason)
        image, where = self.framed(i, sample.image)
        keep = ~sample.crowd
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
        boxes = where.to_input(sample.boxes_xyxy[keep])
        return Framed(image, where, boxes, sample.labels[keep], truth, corrupt)

    def framed(self, i: int, image: np.ndarray) -> tuple[np.ndarray, Any]:
        """The i-th picture in its frame, and where it lies there."""
        return self.letterbox(image, *self.frame_px)


def _nothing(image_id: int) -> Sample:
    """What stands for a picture that can't be read."""
    none = np.zeros(0, np.float32)
    grey = np.full((STRIDE_PX, STRIDE_PX, 3), FILL, np.uint8)
    return Sample(grey, none.reshape(0, 4), none.astype(int), none.astype(bool), none, image_id)


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


def _collate(items: Sequence[Framed]) -> Batch:
    return make_batch(
        torch.from_numpy(np.stack([item.image for item in items])),
        [item.boxes_xyxy for item in items],
        [item.labels for item in items],
        [item.truth.image_id for item in items],
        corrupt=tuple(item.corrupt for item in items if item.corrupt),
        frames=tuple(item.where for item in items),
        truth=tuple(item.truth for item in items),
    )
