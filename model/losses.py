"""The training criteria of the two heads: losses by name, gains inside.

Every loss is normalised within the micro-batch it is given, so a global batch cut into the same
micro-batches has the same losses at any world size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .assign import Alignment, Targets, align_cells, match_anchors
from .boxes import complete_iou, xyxy_to_cxcywh
from .head import AlignedHead, AnchorHead

# Objectness of the level with the most cells weighs most: YOLOv5's balance for P3, P4, P5.
LEVEL_BALANCE = (4.0, 1.0, 0.4)
# Objects below this many strides of the finest level have the cells of a square so large to choose
# from; found by trial, see docs/benchmarks.md.
SMALL_STRIDES = 3


class AnchorCriterion(nn.Module):
    """Box = mean(1 - CIoU) over positives, obj = BCE against that CIoU, cls = BCE.

    Gains are scaled to the number of classes and the input size as published.

    Args:
        box, obj, cls: gains of the three losses.
    """

    names = ("box", "obj", "cls")
    sums_over_pictures = True  # YOLOv5's total is the mean times the batch

    def __init__(self, box: float, obj: float, cls: float):
        super().__init__()
        self.box_gain, self.obj_gain, self.cls_gain = box, obj, cls

    def forward(
        self, head: AnchorHead, raw: Sequence[Tensor], targets: Targets
    ) -> dict[str, Tensor]:
        """Raw maps `[B, A, H, W, 5 + C]` and N targets → `{"box", "obj", "cls"}`, scalars."""
        sizes = [(level.shape[2], level.shape[3]) for level in raw]
        matched = match_anchors(targets, head.anchors, head.strides, sizes)
        box, obj, cls = (raw[0].new_zeros(1, dtype=torch.float32) for _ in range(3))
        for level, matches, balance in zip(raw, matched, LEVEL_BALANCE, strict=True):
            objectness = level.new_zeros(level.shape[:4], dtype=torch.float32)
            if len(matches.image):
                at = (matches.image, matches.anchor, matches.row, matches.column)
                predicted = level[at].float()
                centre = predicted[:, :2].sigmoid() * 2 - 0.5
                wh = (predicted[:, 2:4].sigmoid() * 2).square() * matches.anchor_size
                iou = complete_iou(torch.cat((centre, wh), dim=-1), matches.boxes)
                box = box + (1 - iou).mean()
                _claim(objectness, at, iou.detach().clamp(min=0))
                if head.classes > 1:
                    one_hot = F.one_hot(matches.label, head.classes).float()
                    cls = cls + F.binary_cross_entropy_with_logits(predicted[:, 5:], one_hot)
            obj = obj + balance * F.binary_cross_entropy_with_logits(
                level[..., 4].float(), objectness
            )
        levels = len(raw)
        # Cells per pixel² are fixed, so the share of empty cells follows the input size.
        area = raw[0].shape[2] * raw[0].shape[3] * head.strides[0] ** 2
        return {
            "box": (box * self.box_gain * 3 / levels).squeeze(0),
            "obj": (obj * self.obj_gain * (area / 640**2) * 3 / levels).squeeze(0),
            "cls": (cls * self.cls_gain * (head.classes / 80) * 3 / levels).squeeze(0),
        }


def _claim(objectness: Tensor, at: tuple[Tensor, ...], iou: Tensor) -> None:
    """Writes the IoU of K positives into `[B, A, H, W]`; of several at one place the last one's.

    The last in the order of `match_anchors` is what YOLOv5's published losses show. A plain
    assignment leaves open which one wins, so each place first gets the number of its last claim.
    """
    index = torch.zeros_like(at[0])
    for coordinate, size in zip(at, objectness.shape, strict=True):
        index = index * size + coordinate
    last = torch.zeros(objectness.numel(), dtype=torch.int64, device=index.device)
    last.scatter_reduce_(0, index, torch.arange(len(index), device=index.device), "amax")
    objectness.view(-1)[index] = iou[last[index]]


class AlignedCriterion(nn.Module):
    """Box = 1 - CIoU, dfl = distribution focal loss, cls = BCE against the alignment's quality.

    The classes' loss is divided by the sum of qualities (Feng et al., TOOD, 2021, section 3.2, with
    BCE for its focal loss as in YOLOv8). Box and dfl are means over an object's cells by their
    quality, then over objects. TOOD sums them by quality: a large object has many good cells, so
    the small ones hardly count (docs/benchmarks.md has what that costs).

    Args:
        box, cls, dfl: gains of the three losses.
    """

    names = ("box", "cls", "dfl")
    sums_over_pictures = False

    def __init__(self, box: float, cls: float, dfl: float):
        super().__init__()
        self.box_gain, self.cls_gain, self.dfl_gain = box, cls, dfl

    def forward(
        self, head: AlignedHead, raw: Sequence[Tensor], targets: Targets
    ) -> dict[str, Tensor]:
        """Raw maps `[B, H, W, 4·R + C]` and N targets → `{"box", "cls", "dfl"}`, scalars."""
        distances, logits = head.split(raw)
        centres, strides = head.cells(raw)
        boxes = head.boxes(distances, centres, strides)
        found = align_cells(
            targets,
            boxes.detach(),
            logits.detach().sigmoid(),
            centres,
            SMALL_STRIDES * min(head.strides),
        )
        wanted = torch.zeros_like(logits)
        wanted[found.image, found.cell, targets.label[found.target]] = found.quality
        total = found.quality.sum().clamp(min=1)
        cls = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / total

        at, truth = (found.image, found.cell), targets.boxes[found.target]
        centre, stride = centres[found.cell], strides[found.cell]
        iou = complete_iou(xyxy_to_cxcywh(boxes[at]), xyxy_to_cxcywh(truth))
        share = quality_shares(found, len(targets.label)) / max(1, len(targets.label))
        box = ((1 - iou) * share).sum()
        to_sides = torch.cat((centre - truth[:, :2], truth[:, 2:] - centre), dim=1)
        focal = distribution_focal_loss(distances[at], to_sides / stride)
        dfl = (focal * share).sum()
        return {"box": box * self.box_gain, "cls": cls * self.cls_gain, "dfl": dfl * self.dfl_gain}


def quality_shares(found: Alignment, objects: int) -> Tensor:
    """For each of K positives its share in the quality of all cells of its object, `[K]`."""
    sums = found.quality.new_zeros(objects).scatter_add_(0, found.target, found.quality)
    return found.quality / sums[found.target].clamp(min=1e-9)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropy with the two bins round each distance, by their nearness: a mean over sides.

    Li et al., "Generalized Focal Loss", 2020, equation 6.

    Args:
        logits: `[K, 4, R]`. distances: `[K, 4]` in bins, clamped to what the bins can say.
    """
    distances = distances.clamp(0, logits.shape[-1] - 1 - 0.01)
    lower = distances.long()
    share = distances - lower  # of the upper bin
    logs = logits.log_softmax(-1)
    at_lower = logs.gather(-1, lower[..., None]).squeeze(-1)
    at_upper = logs.gather(-1, lower[..., None] + 1).squeeze(-1)
    return -(at_lower * (1 - share) + at_upper * share).mean(-1)
