"""From candidates to detections: threshold, class-aware NMS, back to the picture."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms

from .letterbox import Letterbox

MAX_CANDIDATES = 30_000  # into NMS; published for YOLOv5's validation
MAX_DETECTIONS = 300


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, best first. N boxes."""

    boxes: Tensor  # [N, 4] xyxy, pixels
    scores: Tensor  # [N] in [0, 1]
    labels: Tensor  # [N] int64, class index

    def __len__(self) -> int:
        return len(self.scores)


def candidates(boxes: Tensor, scores: Tensor, confidence: float) -> Detections:
    """All boxes of one image above the threshold, a box once for each class it scores in.

    Args:
        boxes: `[M, 4]` xyxy. scores: `[M, C]`. confidence: the threshold.
    """
    where, label = (scores > confidence).nonzero(as_tuple=True)
    score = scores[where, label]
    if len(score) > MAX_CANDIDATES:
        score, top = score.topk(MAX_CANDIDATES)
        where, label = where[top], label[top]
    return Detections(boxes[where], score, label)


def suppress(found: Detections, confidence: float, iou: float) -> Detections:
    """Class-aware non-maximum suppression of candidates; cheap enough for a slider."""
    sure = found.scores > confidence
    boxes, scores, labels = found.boxes[sure], found.scores[sure], found.labels[sure]
    keep = _nms_by_class(boxes.float(), scores.float(), labels, iou)[:MAX_DETECTIONS]
    return Detections(boxes[keep], scores[keep], labels[keep])


def _nms_by_class(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Indices of the boxes that no better box of their class overlaps, best first.

    torchvision's `batched_nms` moves the classes apart by the largest coordinate instead, and
    boxes that reach over the upper left border then meet boxes of another class.
    """
    by_class = labels.argsort(stable=True).split(labels.bincount().tolist())
    kept = [members[nms(boxes[members], scores[members], iou)] for members in by_class]
    keep = torch.cat([labels[:0], *kept]).sort().values  # equal scores keep their order
    return keep[scores[keep].argsort(descending=True, stable=True)]


def to_picture(found: Detections, frame: Letterbox) -> Detections:
    """The same detections in the pixels of the original picture."""
    return Detections(frame.to_picture(found.boxes), found.scores, found.labels)


def postprocess(boxes: Tensor, scores: Tensor, confidence: float, iou: float) -> list[Detections]:
    """Decoded predictions `[B, M, 4]`, `[B, M, C]` → the detections of each image."""
    boxes, scores = boxes.detach().cpu(), scores.detach().cpu()
    return [
        suppress(candidates(b, s, confidence), confidence, iou)
        for b, s in zip(boxes, scores, strict=True)
    ]
