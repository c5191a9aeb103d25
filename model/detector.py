"""The detectors: backbone → feature registry → neck → head, and how to build each by arguments.

| name | backbone | neck | head |
|------|----------|------|------|
| `yolov5` | CSPDarknet | PANet | anchors |
| `seed_convnext_yolo` | any of timm | 1×1 adapters, PANet | anchors |
| `convnext_yolo` | any of timm | norms, large-kernel PANet | anchor-free, decoupled |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import STRIDES, Backbone
from .csp import CSPDarknet, scaled_depth
from .head import AlignedHead, AnchorHead
from .losses import AlignedCriterion, AnchorCriterion
from .neck import PANet, large_kernel_neck, seed_neck, yolov5_neck
from .registry import FeatureRegistry

Anchors = Sequence[Sequence[Sequence[float]]]  # for each level, pairs of width and height, px
Criterion = AnchorCriterion | AlignedCriterion


@dataclass(frozen=True)
class RawPredictions:
    """What the network says, before any decoding: one map of logits a level, see the heads."""

    levels: tuple[Tensor, ...]


class Detector(nn.Module):
    """A function: images in, raw predictions out; the same in training and in inference."""

    def __init__(
        self, backbone: Backbone | CSPDarknet, neck: PANet, head: AnchorHead | AlignedHead
    ):
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, images: Tensor) -> RawPredictions:
        """`[B, 3, H, W]` uint8 in [0, 255] or floats in [0, 1]; H and W multiples of 32."""
        if images.dtype == torch.uint8:
            images = images.to(next(self.parameters()).dtype) / 255
        features = FeatureRegistry()
        self.backbone(images, features)
        maps = self.neck(features)
        features.assert_empty()
        return RawPredictions(tuple(self.head(maps)))

    def decode(self, raw: RawPredictions) -> tuple[Tensor, Tensor]:
        """Raw predictions → boxes `[B, M, 4]` xyxy in input pixels, scores `[B, M, C]`."""
        return self.head.decode(raw.levels)


def yolov5(classes: int, depth: float, width: float, anchors: Anchors) -> Detector:
    """YOLOv5 v6: n, s, m, l by depth and width multiples (see `CSPDarknet`)."""
    backbone = CSPDarknet(depth, width)
    neck = yolov5_neck(backbone.channels, scaled_depth(3, depth))
    return Detector(backbone, neck, AnchorHead(backbone.channels, classes, anchors, STRIDES))


def seed_convnext_yolo(
    classes: int,
    backbone: Mapping[str, Any],
    adapter_channels: Sequence[int],
    neck_channels: Sequence[int],
    neck_repeats: int,
    anchors: Anchors,
) -> Detector:
    """The study's detector: a ConvNeXt in the place of YOLOv5's backbone.

    Args:
        classes: number of classes.
        backbone: arguments of `Backbone`.
        adapter_channels: channels of P3, P4, P5 after the adapters.
        neck_channels: channels of the neck's three outputs.
        neck_repeats: bottlenecks in each block of the neck.
        anchors: for each level pairs of width and height in pixels.
    """
    trunk = Backbone(**backbone)
    neck = seed_neck(trunk.channels, adapter_channels, neck_channels, neck_repeats)
    return Detector(trunk, neck, AnchorHead(neck_channels, classes, anchors, STRIDES))


def convnext_yolo(
    classes: int,
    backbone: Mapping[str, Any],
    neck_channels: Sequence[int],
    neck_repeats: int,
    head_channels: int,
    head_convs: int,
    distance_bins: int,
) -> Detector:
    """Ours: a norm on each tapped stage, large-kernel neck, anchor-free decoupled head.

    Args:
        classes: number of classes.
        backbone: arguments of `Backbone`.
        neck_channels: channels of P3, P4, P5 in the neck.
        neck_repeats: bottlenecks in each block of the neck.
        head_channels, head_convs: width and depth of the head's branches.
        distance_bins: bins of the distribution of a box's side.
    """
    trunk = Backbone(**backbone)
    neck = large_kernel_neck(trunk.channels, neck_channels, neck_repeats)
    head = AlignedHead(neck_channels, classes, head_channels, head_convs, distance_bins, STRIDES)
    return Detector(trunk, neck, head)


ARCHITECTURES: dict[str, Callable[..., Detector]] = {
    "yolov5": yolov5,
    "seed_convnext_yolo": seed_convnext_yolo,
    "convnext_yolo": convnext_yolo,
}


def build_detector(architecture: Mapping[str, Any]) -> Detector:
    """Builds a detector from `{"name": …, **arguments}`, the form kept in exported weights."""
    arguments = dict(architecture)
    return ARCHITECTURES[arguments.pop("name")](**arguments)


def without_pretrained(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The same architecture with nothing to fetch: all of its weights come from elsewhere."""
    result = dict(architecture)
    if "backbone" in result:
        result["backbone"] = {**result["backbone"], "pretrained": False, "weights": None}
    return result


def build_criterion(detector: Detector, gains: Mapping[str, float]) -> Criterion:
    """The criterion that goes with the detector's head, with gains by the names of its losses."""
    kind = AnchorCriterion if isinstance(detector.head, AnchorHead) else AlignedCriterion
    return kind(**gains)
