"""Box geometry. Boxes are `[..., 4]`, xyxy in pixels unless a name says otherwise."""

import math

import torch
from torch import Tensor


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre and size, `[..., 4]` → `[..., 4]`."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners, `[..., 4]` → `[..., 4]`."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes pair by pair, xyxy `[..., 4]` that broadcast → `[...]` in [0, 1]."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (first, second)]
    return intersection / (areas[0] + areas[1] - intersection).clamp(min=1e-7)


def complete_iou(first: Tensor, second: Tensor, eps: float = 1e-7) -> Tensor:
    """CIoU of boxes pair by pair, cxcywh `[N, 4]` each → `[N]` in (-1.5, 1].

    Zheng et al., "Distance-IoU Loss", AAAI 2020, and "Enhancing Geometric Factors", 2020: the IoU
    less the squared centre distance over the squared diagonal of the enclosing box, less the
    difference of aspect ratio `v` weighted by `alpha` (which carries no gradient, as published).
    """
    (w1, h1), (w2, h2) = first[:, 2:].unbind(-1), second[:, 2:].unbind(-1)
    corners1, corners2 = cxcywh_to_xyxy(first), cxcywh_to_xyxy(second)
    low = torch.maximum(corners1[:, :2], corners2[:, :2])
    high = torch.minimum(corners1[:, 2:], corners2[:, 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = w1 * h1 + w2 * h2 - intersection + eps
    iou = intersection / union

    enclosing = torch.maximum(corners1[:, 2:], corners2[:, 2:]) - torch.minimum(
        corners1[:, :2], corners2[:, :2]
    )
    diagonal2 = enclosing.square().sum(-1) + eps
    distance2 = (first[:, :2] - second[:, :2]).square().sum(-1)

    v = (4 / math.pi**2) * (torch.atan(w2 / (h2 + eps)) - torch.atan(w1 / (h1 + eps))).square()
    with torch.no_grad():
        # Rounding takes the IoU of two equal boxes over 1, and 0 / 0 must not come of it.
        alpha = v / (v + (1 - iou).clamp(min=0) + eps)
    return iou - distance2 / diagonal2 - alpha * v
