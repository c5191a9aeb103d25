"""The neck: a path-aggregation network over P3, P4, P5.

PANet (Liu et al., 2018) in YOLOv5's form: top-down, then bottom-up, with C3 blocks. What stands
between backbone and neck (`adapters`), the norm and the blocks differ between the detectors.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import C3, Bottleneck, Conv, LargeKernelBottleneck, Norm
from .norms import LayerNorm2d, MicroBatchNorm2d, group_norm
from .registry import FeatureRegistry

LEVELS = ("P3", "P4", "P5")
PLAIN = partial(Bottleneck, shortcut=False)  # YOLOv5's necks have no shortcuts


class PANet(nn.Module):
    """Takes P3, P4, P5 from the registry, gives them back mixed over scales.

    Args:
        adapters: for each level what its map passes first.
        adapter_channels: channels of the three maps after the adapters.
        out_channels: channels of the three outputs.
        repeats, bottleneck: the inside of each C3 block.
        norm: of every convolution here.
        joins_lateral: whether the bottom-up path joins P4 after its lateral 1×1 convolution, as
            YOLOv5 does, or before it.
    """

    def __init__(
        self,
        adapters: Sequence[nn.Module],
        adapter_channels: Sequence[int],
        out_channels: Sequence[int],
        repeats: int,
        bottleneck: Callable[[int], nn.Module],
        norm: Norm = MicroBatchNorm2d,
        joins_lateral: bool = True,
    ):
        super().__init__()
        a3, a4, a5 = adapter_channels
        o3, o4, o5 = out_channels
        self.joins_lateral = joins_lateral
        self.adapters = nn.ModuleList(adapters)
        self.lateral5 = Conv(a5, o4, norm=norm)
        self.top_down4 = C3(o4 + a4, o4, repeats, bottleneck, norm)
        self.lateral4 = Conv(o4, o3, norm=norm)
        self.top_down3 = C3(o3 + a3, o3, repeats, bottleneck, norm)
        self.down3 = Conv(o3, o3, kernel=3, stride=2, norm=norm)
        self.bottom_up4 = C3(o3 + (o3 if joins_lateral else o4), o4, repeats, bottleneck, norm)
        self.down4 = Conv(o4, o4, kernel=3, stride=2, norm=norm)
        self.bottom_up5 = C3(2 * o4, o5, repeats, bottleneck, norm)

    def forward(self, features: FeatureRegistry) -> list[Tensor]:
        """P3 `[B, in3, H, W]`, P4 at half and P5 at a quarter of that → the three outputs."""
        return self.mix(*(features.take(level) for level in LEVELS))

    def mix(self, p3: Tensor, p4: Tensor, p5: Tensor) -> list[Tensor]:
        """What `forward` does, without the registry: this can be checkpointed and recomputed."""
        p3, p4, p5 = (adapter(p) for p, adapter in zip((p3, p4, p5), self.adapters, strict=True))
        top = self.lateral5(p5)
        middle = self.top_down4(torch.cat((_upsample(top), p4), dim=1))
        lateral = self.lateral4(middle)
        out3 = self.top_down3(torch.cat((_upsample(lateral), p3), dim=1))
        joined = lateral if self.joins_lateral else middle
        out4 = self.bottom_up4(torch.cat((self.down3(out3), joined), dim=1))
        out5 = self.bottom_up5(torch.cat((self.down4(out4), top), dim=1))
        return [out3, out4, out5]


def yolov5_neck(channels: Sequence[int], repeats: int) -> PANet:
    """YOLOv5's own: as wide as the backbone, nothing in between."""
    passing = [nn.Identity() for _ in channels]
    return PANet(passing, channels, channels, repeats, PLAIN)


def seed_neck(
    in_channels: Sequence[int],
    adapter_channels: Sequence[int],
    out_channels: Sequence[int],
    repeats: int,
) -> PANet:
    """The study's: 1×1 adapters, and P4 joined before its lateral convolution.

    Only with that join does the neck have the parameters that the study gives.
    """
    adapters = [Conv(i, a) for i, a in zip(in_channels, adapter_channels, strict=True)]
    return PANet(adapters, adapter_channels, out_channels, repeats, PLAIN, joins_lateral=False)


def large_kernel_neck(in_channels: Sequence[int], channels: Sequence[int], repeats: int) -> PANet:
    """Ours: the blocks of RTMDet (Lyu et al., 2022) under GroupNorm.

    ConvNeXt's stages come out without a norm, so each tapped one gets a LayerNorm, as in the
    detectors that its authors released (Liu et al., "A ConvNet for the 2020s", 2022).
    """
    adapters = [
        nn.Sequential(LayerNorm2d(i), Conv(i, c, norm=group_norm))
        for i, c in zip(in_channels, channels, strict=True)
    ]
    return PANet(adapters, channels, channels, repeats, LargeKernelBottleneck, group_norm)


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
