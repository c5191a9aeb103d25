"""The detector: backbone → feature registry → neck → head, and how to build one by arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import STRIDES, Backbone
from .head import AnchorHead
from .layers import MicroBatchNorm2d
from .neck import PANet
from .registry import FeatureRegistry


@dataclass(frozen=True)
class RawPredictions:
    """What the network says, before any decoding: one map `[B, A, H, W, 5 + C]` a level."""

    levels: tuple[Tensor, ...]


class ConvNeXtYOLO(nn.Module):
    """The study's detector: timm ConvNeXt → 1×1 adapters → PANet → anchor head.

    Args:
        classes: number of classes.
        backbone: a timm name whose stages reach strides 8, 16, 32.
        backbone_options: arguments of the timm model (`depths`, `dims`, `drop_path_rate`, …).
        pretrained, weights: see `Backbone`; neither changes the architecture.
        adapter_channels: channels of P3, P4, P5 after the adapters.
        neck_channels: channels of the neck's three outputs.
        neck_repeats: bottlenecks in each block of the neck.
        anchors: for each level A pairs of width and height in pixels.
    """

    def __init__(
        self,
        classes: int,
        backbone: str,
        backbone_options: Mapping[str, Any],
        adapter_channels: Sequence[int],
        neck_channels: Sequence[int],
        neck_repeats: int,
        anchors: Sequence[Sequence[Sequence[float]]],
        pretrained: bool = False,
        weights: str | None = None,
    ):
        super().__init__()
        self.backbone = Backbone(backbone, backbone_options, pretrained, weights)
        self.neck = PANet(self.backbone.channels, adapter_channels, neck_channels, neck_repeats)
        self.head = AnchorHead(neck_channels, classes, anchors, STRIDES)

    def forward(self, images: Tensor) -> RawPredictions:
        """`[B, 3, H, W]` uint8 in [0, 255] or floats in [0, 1]; H and W multiples of 32."""
        if images.dtype == torch.uint8:
            images = images.to(self.head.anchors.dtype) / 255
        features = FeatureRegistry()
        self.backbone(images, features)
        maps = self.neck(features)
        features.assert_empty()
        return RawPredictions(tuple(self.head(maps)))

    def decode(self, raw: RawPredictions) -> tuple[Tensor, Tensor]:
        """Raw predictions → boxes `[B, M, 4]` xyxy in input pixels, scores `[B, M, C]`."""
        return self.head.decode(raw.levels)


ARCHITECTURES = {"convnext_yolo": ConvNeXtYOLO}


def build_detector(architecture: Mapping[str, Any]) -> ConvNeXtYOLO:
    """Builds a detector from `{"name": …, **arguments}`, the form kept in exported weights."""
    arguments = dict(architecture)
    return ARCHITECTURES[arguments.pop("name")](**arguments)


def micro_batch_norms(model: nn.Module) -> list[MicroBatchNorm2d]:
    """The norms whose running statistics wait for `move_running`, in the order of modules."""
    return [module for module in model.modules() if isinstance(module, MicroBatchNorm2d)]
