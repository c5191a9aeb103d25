"""What the stream hands over: micro-batches, and the parts that processes make of them.

B pictures of one size, N boxes in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Truth:
    """The annotations of one picture in its own pixels, crowds included. N boxes."""

    image_id: int
    width_px: int
    height_px: int
    boxes_xyxy: np.ndarray  # [N, 4]
    labels: np.ndarray  # [N]
    crowd: np.ndarray  # [N] bool
    area: np.ndarray  # [N]


@dataclass(frozen=True)
class Corrupt:
    """A sample that could not be used. A line of the quarantine ledger."""

    shard: str
    key: str
    reason: str


Place = tuple[int, int]  # of a picture: its lane and step


@dataclass(frozen=True)
class Part:
    """What one process makes of a micro-batch: some of its slots. Cheap to send but for pixels.

    Finished samples; or, for a device that composes, the pictures that it does not have yet, of
    these slots and from before the run's first step. F of either.
    """

    boxes_xyxy: list[np.ndarray]  # [F] of [N, 4] float32
    labels: list[np.ndarray]  # [F] of [N] int64
    image_ids: list[int]  # [F]
    corrupt: tuple[Corrupt, ...]
    pixels: np.ndarray | None  # [F, H, W, 3] uint8; None: they wait in the ring
    # Pictures only: which they are, and their heights and widths; each is alone in its frame,
    # pixel after pixel from the frame's first byte.
    places: tuple[Place, ...] = ()  # [F]
    sizes: tuple[tuple[int, int], ...] = ()  # [F]


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    images: Tensor  # [B, H, W, 3] uint8; the device permutes it to channels first
    image_index: Tensor  # [N] int64, which picture a box belongs to
    labels: Tensor  # [N] int64, class index
    boxes_xyxy: Tensor  # [N, 4] float32, pixels of the frame
    image_ids: tuple[int, ...]  # [B], as in the annotations
    corrupt: tuple[Corrupt, ...] = ()  # found on the way, each once by each process
    # Validation only: where each picture lies in its frame, and its annotations as they are.
    frames: tuple[Any, ...] = ()  # [B]
    truth: tuple[Truth, ...] = ()  # [B]


def make_batch(
    images: Tensor,
    boxes_xyxy: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    image_ids: Sequence[int],
    **more: Any,
) -> Batch:
    """A micro-batch of finished images `[B, H, W, 3]` and the boxes of each."""
    counts = [len(n) for n in labels]
    return Batch(
        images=images,
        image_index=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        labels=torch.from_numpy(np.concatenate(labels)),
        boxes_xyxy=torch.from_numpy(np.concatenate(boxes_xyxy)),
        image_ids=tuple(image_ids),
        **more,
    )


def join(parts: Sequence[Part], pixels: Sequence[Tensor]) -> Batch:
    """Joins what n processes made: part i holds slots i, i + n, i + 2n, … of the micro-batch.

    Args:
        parts: of one micro-batch, finished samples.
        pixels: of each part; they are copied, so that their memory can be used again.
    """
    # Pinned, they go to a GPU while it works.
    shape = (sum(map(len, pixels)), *pixels[0].shape[1:])
    images = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    for i, frames in enumerate(pixels):
        images[i :: len(parts)] = frames
    return make_batch(
        images,
        _in_turn([part.boxes_xyxy for part in parts]),
        _in_turn([part.labels for part in parts]),
        _in_turn([part.image_ids for part in parts]),
        corrupt=tuple(corrupt for part in parts for corrupt in part.corrupt),
    )


def _in_turn(parts: Sequence[Sequence[Any]]) -> list[Any]:
    result: list[Any] = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        result[i :: len(parts)] = part
    return result
