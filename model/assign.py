"""Which prediction answers for which object.

`match_anchors`, for the anchor head: YOLOv5's shape matching. An object belongs to an anchor whose
width and height are both within a factor of its own, in the object's own cell and in the up to
two neighbours that its centre is closest to; to several anchors, cells and levels, or to none.

`align_cells`, for the anchor-free head: task alignment (Feng et al., TOOD, 2021). An object
belongs to the cells inside it whose predictions are best in class and box together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import pairwise_iou

SHAPE_RATIO = 4.0
# Cells an object, powers of score and IoU: YOLOv8's numbers for TOOD's.
TOP_CELLS, SCORE_POWER, IOU_POWER = 10, 0.5, 6.0


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


class Alignment(NamedTuple):
    """Positives of a batch. K positives, no two at one cell of one image."""

    image: Tensor  # [K]
    cell: Tensor  # [K] of the M cells of all levels
    target: Tensor  # [K] which object
    quality: Tensor  # [K] in [0, 1]: the score that the cell should give its class


@torch.no_grad()
def align_cells(
    targets: Targets, boxes: Tensor, scores: Tensor, centres: Tensor, least_px: float
) -> Alignment:
    """Gives each object its best cells, by score^.5 · IoU^6 of what they predict now.

    A cell that several objects want goes to the one it overlaps most. The quality of an object's
    cells is their metric, scaled so that the best has the object's best IoU (TOOD, section 3.2).

    Args:
        targets: N objects.
        boxes, scores: predictions `[B, M, 4]` xyxy in pixels and `[B, M, C]` in [0, 1].
        centres: of the M cells, `[M, 2]` in pixels.
        least_px: objects smaller than this are taken as so large when cells inside them are
            looked for, so that the smallest still have some to choose from.
    """
    (image, label, truth), cells = targets, len(centres)
    if not len(label):
        return Alignment(image, image, image, boxes.new_zeros(0))
    middle = (truth[:, :2] + truth[:, 2:]) / 2
    half = (truth[:, 2:] - truth[:, :2]).clamp(min=least_px) / 2
    inside = ((centres - middle[:, None]).abs() <= half[:, None]).all(-1)  # [N, M]
    # The floor keeps an object that nothing overlaps yet from having no cell. Its sixth power needs
    # 64 bits.
    iou = pairwise_iou(truth[:, None], boxes[image]).clamp(min=1e-6)
    metric = scores[image, :, label].double() ** SCORE_POWER * iou.double() ** IOU_POWER * inside
    best, cell = metric.topk(min(TOP_CELLS, cells))  # [N, K]
    target = torch.arange(len(label), device=label.device)[:, None].expand_as(cell)
    chosen = best > 0
    target, cell, metric = target[chosen], cell[chosen], best[chosen]
    iou = iou[target, cell]
    won = _winners(image[target] * cells + cell, iou, len(boxes) * cells)
    target, cell, metric, iou = target[won], cell[won], metric[won], iou[won]
    top_metric = _largest(metric, target, len(label))
    top_iou = _largest(iou, target, len(label))
    quality = (metric / top_metric * top_iou).to(scores.dtype)
    return Alignment(image[target], cell, target, quality)


def _winners(place: Tensor, iou: Tensor, places: int) -> Tensor:
    """Which of the claims `[P]` to places wins: the largest IoU, of equal ones the first."""
    highest = iou.new_zeros(places).scatter_reduce_(0, place, iou, "amax")
    wins = iou == highest[place]
    number = torch.arange(len(place), device=place.device)
    first = number.new_full((places,), len(place))
    first.scatter_reduce_(0, place[wins], number[wins], "amin")
    return first[place] == number


def _largest(values: Tensor, target: Tensor, targets: int) -> Tensor:
    """For each value the largest one of its target, `[K]`."""
    return values.new_zeros(targets).scatter_reduce_(0, target, values, "amax")[target]
