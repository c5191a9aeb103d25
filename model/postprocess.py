"""From candidates to detections: threshold, class-aware NMS, back to the picture."""

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Candidates:
    """Every box of one picture above a low threshold, not yet suppressed."""

    found: Detections  # in the pixels of the network's input
    frame: Letterbox  # where the picture lies there

    def suppress(self, confidence: float, iou: float) -> Detections:
        """Detections in the pixels of the picture, best first; cheap enough for a slider."""
        kept = suppress(self.found, confidence, iou)
        return Detections(self.frame.to_picture(kept.boxes), kept.scores, kept.labels)


def candidates(
    boxes: Tensor, scores: Tensor, frames: Sequence[Letterbox], confidence: float
) -> list[Candidates]:
    """Decoded predictions → the candidates of each picture, on the CPU.

    A box is a candidate once for each class that it scores in.

    Args:
        boxes: `[B, M, 4]` xyxy in input pixels. scores: `[B, M, C]`.
        frames: where the B pictures lie in the input.
        confidence: the least score of a candidate.
    """
    result = []
    pictures = zip(boxes.detach().cpu(), scores.detach().cpu(), frames, strict=True)
    for box, score_by_class, frame in pictures:
        where, label = (score_by_class > confidence).nonzero(as_tuple=True)
        score = score_by_class[where, label]
        if len(score) > MAX_CANDIDATES:
            score, top = score.topk(MAX_CANDIDATES)
            where, label = where[top], label[top]
        result.append(Candidates(Detections(box[where], score, label), frame))
    return result


def suppress(found: Detections, confidence: float, iou: float) -> Detections:
    """Class-aware non-maximum suppression of boxes above a confidence."""
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
