"""The building blocks of necks and heads: norms, convolution, bottlenecks, partial blocks.

Shapes: B batch, H W cells. `Conv`, `Bottleneck` and `C3` follow the published description of
YOLOv5 v6 and of CSPNet (Wang et al., 2020), `LargeKernelBottleneck` that of RTMDet (Lyu et al.,
2022). A `Norm` is a function from channels to a module, so that one block serves both detectors:
BatchNorm as YOLOv5 has it, GroupNorm as RTMDet-ConvNeXt has it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import MicroBatchNorm2d, group_norm

Norm = Callable[[int], nn.Module]


class Conv(nn.Module):
    """Convolution without bias, norm, SiLU; `stride` divides H and W."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        norm: Norm = MicroBatchNorm2d,
    ):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False
        )
        self.norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the three in turn."""
        return F.silu(self.norm(self.conv(x)))


class SeparableConv(nn.Sequential):
    """Depthwise k×k, then 1×1: a large kernel for the price of a small one."""

    def __init__(self, channels: int, kernel: int, norm: Norm):
        super().__init__(
            Conv(channels, channels, kernel, groups=channels, norm=norm),
            Conv(channels, channels, norm=norm),
        )


class Bottleneck(nn.Module):
    """1×1 then 3×3 convolution, with a residual connection where asked for."""

    def __init__(self, channels: int, shortcut: bool, norm: Norm = MicroBatchNorm2d):
        super().__init__()
        self.reduce = Conv(channels, channels, 1, norm=norm)
        self.expand = Conv(channels, channels, 3, norm=norm)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Shape in = shape out, `[B, channels, H, W]`."""
        y = self.expand(self.reduce(x))
        return x + y if self.shortcut else y


class LargeKernelBottleneck(nn.Module):
    """3×3 then separable 5×5 convolution, with a residual connection (RTMDet's basic block)."""

    def __init__(self, channels: int, norm: Norm = group_norm):
        super().__init__()
        self.mix = Conv(channels, channels, 3, norm=norm)
        self.widen = SeparableConv(channels, 5, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in = shape out, `[B, channels, H, W]`."""
        return x + self.widen(self.mix(x))


class C3(nn.Module):
    """Cross-stage partial block with three convolutions.

    Half of the channels pass the bottlenecks, half go round them.

    Args:
        in_channels, out_channels: of the block.
        repeats: number of bottlenecks.
        bottleneck: makes one, for a number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int,
        bottleneck: Callable[[int], nn.Module],
        norm: Norm = MicroBatchNorm2d,
    ):
        super().__init__()
        hidden = out_channels // 2
        self.main = Conv(in_channels, hidden, norm=norm)
        self.bypass = Conv(in_channels, hidden, norm=norm)
        self.blocks = nn.Sequential(*(bottleneck(hidden) for _ in range(repeats)))
        self.fuse = Conv(2 * hidden, out_channels, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` → `[B, out, H, W]`."""
        return self.fuse(torch.cat((self.blocks(self.main(x)), self.bypass(x)), dim=1))
