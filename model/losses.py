"""The training criterion of the anchor head: box, objectness and class losses, by name."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .assign import Targets, match_anchors
from .boxes import complete_iou
from .head import AnchorHead

# Objectness of the level with the most cells weighs most: YOLOv5's balance for P3, P4, P5.
LEVEL_BALANCE = (4.0, 1.0, 0.4)


class AnchorCriterion(nn.Module):
    """Box = mean(1 - CIoU) over positives, obj = BCE against that CIoU, cls = BCE.

    Every loss is a mean within the micro-batch it is given, so a global batch cut into the same
    micro-batches has the same losses at any world size. Gains are scaled to the number of classes
    and the input size as published, and come out inside the returned losses.

    Args:
        box_gain, obj_gain, cls_gain: weights of the three losses.
    """

    def __init__(self, box_gain: float, obj_gain: float, cls_gain: float):
        super().__init__()
        self.box_gain, self.obj_gain, self.cls_gain = box_gain, obj_gain, cls_gain

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
