"""Which anchor at which cell answers for which object: YOLOv5's shape matching.

An object belongs to an anchor whose width and height are both within a factor of its own, in the
object's own cell and in the up to two neighbours that its centre is closest to. An object may
match several anchors, cells and levels, or none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SHAPE_RATIO = 4.0


class Targets(NamedTuple):
    """Objects of a batch, all images in one list. N objects."""

    image: Tensor  # [N] int64, the image in the batch
    label: Tensor  # [N] int64, class index
    boxes: Tensor  # [N, 4] xyxy in input pixels

    def to(self, device: torch.device) -> "Targets":
        """The same objects on another device."""
        return Targets(*(field.to(device, non_blocking=True) for field in self))


class Matches(NamedTuple):
    """Positives of one level. K positives."""

    image: Tensor  # [K]
    anchor: Tensor  # [K]
    row: Tensor  # [K] cell
    column: Tensor  # [K] cell
    label: Tensor  # [K]
    boxes: Tensor  # [K, 4] cxcywh in cells, centre relative to the cell's corner
    anchor_size: Tensor  # [K, 2] in cells


def match_anchors(
    targets: Targets, anchors_px: Tensor, strides: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> list[Matches]:
    """Matches objects to anchors, level by level.

    Args:
        targets: N objects.
        anchors_px: `[L, A, 2]`, widths and heights.
        strides: pixels a cell of each of the L levels.
        sizes: height and width of each level in cells.
    """
    return [
        _match_level(targets, anchors_px[level] / stride, stride, sizes[level])
        for level, stride in enumerate(strides)
    ]


def _match_level(targets: Targets, anchors: Tensor, stride: int, size: tuple[int, int]) -> Matches:
    height, width = size
    boxes = targets.boxes / stride
    centre, wh = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    ratio = wh[None] / anchors[:, None]  # [A, N, 2]
    fits = torch.maximum(ratio, 1 / ratio).amax(-1) < SHAPE_RATIO
    anchor, target = fits.nonzero(as_tuple=True)

    # The offsets of the candidate cells: own, left, up, right, down.
    offsets = centre.new_tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]) * 0.5
    xy = centre[target]
    from_end = xy.new_tensor([width, height]) - xy
    near_start = (xy % 1 < 0.5) & (xy > 1)  # a left or upper neighbour exists and is nearer
    # A centre exactly on an edge counts its own cell again, as YOLOv5's positives do.
    near_end = (from_end % 1 < 0.5) & (from_end > 1)
    chosen = torch.cat((torch.ones_like(near_start[:, :1]), near_start, near_end), dim=1)  # [P, 5]
    # Offset-major, so that the order of positives does not depend on their number.
    which, pair = chosen.T.nonzero(as_tuple=True)
    anchor, target, xy = anchor[pair], target[pair], xy[pair]

    cell = (xy - offsets[which]).long()
    column, row = cell[:, 0].clamp(0, width - 1), cell[:, 1].clamp(0, height - 1)
    inside = xy - torch.stack((column, row), dim=-1)
    return Matches(
        image=targets.image[target],
        anchor=anchor,
        row=row,
        column=column,
        label=targets.label[target],
        boxes=torch.cat((inside, wh[target]), dim=-1),
        anchor_size=anchors[anchor],
    )
