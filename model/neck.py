"""The neck: adapters and a path-aggregation network over P3, P4, P5.

PANet (Liu et al., 2018) in YOLOv5's form: top-down, then bottom-up, with C3 blocks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import C3, Conv
from .registry import FeatureRegistry

LEVELS = ("P3", "P4", "P5")


class PANet(nn.Module):
    """Takes P3, P4, P5 from the registry, gives them back mixed over scales.

    Args:
        in_channels: channels of the backbone's three maps.
        adapter_channels: channels after the 1×1 adapters.
        out_channels: channels of the three outputs.
        repeats: bottlenecks in each C3 block.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        adapter_channels: Sequence[int],
        out_channels: Sequence[int],
        repeats: int,
    ):
        super().__init__()
        a3, a4, a5 = adapter_channels
        o3, o4, o5 = out_channels
        self.adapters = nn.ModuleList(
            Conv(i, a) for i, a in zip(in_channels, adapter_channels, strict=True)
        )
        self.lateral5 = Conv(a5, o4)
        self.top_down4 = C3(o4 + a4, o4, repeats, shortcut=False)
        self.lateral4 = Conv(o4, o3)
        self.top_down3 = C3(o3 + a3, o3, repeats, shortcut=False)
        self.down3 = Conv(o3, o3, kernel=3, stride=2)
        self.bottom_up4 = C3(o3 + o4, o4, repeats, shortcut=False)
        self.down4 = Conv(o4, o4, kernel=3, stride=2)
        self.bottom_up5 = C3(2 * o4, o5, repeats, shortcut=False)

    def forward(self, features: FeatureRegistry) -> list[Tensor]:
        """P3 `[B, in3, H, W]`, P4 at half and P5 at a quarter of that → the three outputs."""
        p3, p4, p5 = (
            adapter(features.take(level))
            for level, adapter in zip(LEVELS, self.adapters, strict=True)
        )
        top = self.lateral5(p5)
        middle = self.top_down4(torch.cat((_upsample(top), p4), dim=1))
        out3 = self.top_down3(torch.cat((_upsample(self.lateral4(middle)), p3), dim=1))
        # The study joins P4 here as it was before its lateral convolution (YOLOv5: after it).
        out4 = self.bottom_up4(torch.cat((self.down3(out3), middle), dim=1))
        out5 = self.bottom_up5(torch.cat((self.down4(out4), top), dim=1))
        return [out3, out4, out5]


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
