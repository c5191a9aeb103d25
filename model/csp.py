"""CSPDarknet, the backbone of YOLOv5 v6, from its published table of layers.

| out | layer | channels | stride |
|-----|-------|----------|--------|
|     | Conv 6×6/2 | 64 | 2 |
|     | Conv 3×3/2, C3 × 3 | 128 | 4 |
| P3  | Conv 3×3/2, C3 × 6 | 256 | 8 |
| P4  | Conv 3×3/2, C3 × 9 | 512 | 16 |
| P5  | Conv 3×3/2, C3 × 3, SPPF 5×5 | 1024 | 32 |

Channels are times the width multiple, repeats times the depth multiple.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import C3, Bottleneck, Conv
from .registry import FeatureRegistry


class CSPDarknet(nn.Module):
    """Puts P3, P4, P5 into the feature registry; `channels` tells how wide they are.

    Args:
        depth: depth multiple: .33 for n and s, .67 for m, 1 for l.
        width: width multiple: .25, .5, .75, 1 for n, s, m, l.
    """

    def __init__(self, depth: float, width: float):
        super().__init__()
        c1, c2, c3, c4, c5 = (scaled_width(c, width) for c in (64, 128, 256, 512, 1024))
        self.channels = (c3, c4, c5)
        self.stem = Conv(3, c1, kernel=6, stride=2, padding=2)
        self.stage2 = _stage(c1, c2, scaled_depth(3, depth))
        self.stage3 = _stage(c2, c3, scaled_depth(6, depth))
        self.stage4 = _stage(c3, c4, scaled_depth(9, depth))
        self.stage5 = _stage(c4, c5, scaled_depth(3, depth))
        self.pool = SPPF(c5, kernel=5)
        self.is_checkpointed = False

    def checkpoint_activations(self) -> None:
        """Trades compute for memory: the inside of a stage is computed again for gradients."""
        self.is_checkpointed = True

    def forward(self, images: Tensor, features: FeatureRegistry) -> None:
        """`[B, 3, H, W]`, floats in [0, 1] → puts P3, P4, P5 into `features`."""
        p3 = self._run(self.stage3, self._run(self.stage2, self._run(self.stem, images)))
        p4 = self._run(self.stage4, p3)
        features.put("P3", p3)
        features.put("P4", p4)
        features.put("P5", self.pool(self._run(self.stage5, p4)))

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.is_checkpointed and torch.is_grad_enabled():
            result: Tensor = checkpoint(stage, x, use_reentrant=False)
        else:
            result = stage(x)
        return result


class SPPF(nn.Module):
    """Spatial pyramid pooling, fast: three max-pools in a row see 5, 9 and 13 cells.

    He et al., "Spatial Pyramid Pooling", 2014, in YOLOv5's serial form.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.reduce = Conv(channels, channels // 2)
        self.fuse = Conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in = shape out, `[B, channels, H, W]`."""
        pools = [self.reduce(x)]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], self.kernel, 1, self.kernel // 2))
        return self.fuse(torch.cat(pools, dim=1))


def _stage(in_channels: int, out_channels: int, repeats: int) -> nn.Sequential:
    """Half the height and width, then a cross-stage partial block."""
    return nn.Sequential(
        Conv(in_channels, out_channels, kernel=3, stride=2),
        C3(out_channels, out_channels, repeats, partial(Bottleneck, shortcut=True)),
    )


def scaled_width(channels: int, width: float) -> int:
    """Channels times the width multiple, up to a multiple of 8."""
    return math.ceil(channels * width / 8) * 8


def scaled_depth(repeats: int, depth: float) -> int:
    """Repeats times the depth multiple, rounded, at least one."""
    return max(1, round(repeats * depth))
