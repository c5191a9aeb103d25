"""The building blocks of neck and head: convolution, bottleneck, cross-stage partial block.

The blocks follow the published description of YOLOv5 v6 and of CSPNet (Wang et al., 2020).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MicroBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose running statistics move once a *global* step.

    Training normalises with the statistics of the micro-batch, as BatchNorm always does, and adds
    them to a sum. `commit_batch_statistics` then moves the running statistics by the mean over
    all micro-batches of the global batch. So the same recipe gives the same statistics at any
    world size and accumulation; ordinary BatchNorm moves them once a micro-batch of this rank.
    """

    pending_mean: Tensor
    pending_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.03)
        # Between commits only: not part of a checkpoint, which is written at a step boundary.
        self.register_buffer("pending_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("pending_var", torch.zeros(channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `[B, channels, H, W]` over B, H and W."""
        if not self.training:
            return super().forward(x)
        # With momentum 1 the "running" statistics come back as this micro-batch's own.
        mean, var = torch.zeros_like(self.pending_mean), torch.ones_like(self.pending_var)
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        with torch.no_grad():
            self.pending_mean += mean
            self.pending_var += var
        return y

    def take_pending(self) -> Tensor:
        """Returns this rank's sums `[2, channels]` and forgets them."""
        pending = torch.stack((self.pending_mean, self.pending_var))
        self.pending_mean.zero_()
        self.pending_var.zero_()
        return pending

    @torch.no_grad()
    def move_running(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics towards the global batch's mean statistics."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.momentum is not None and self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        self.num_batches_tracked += 1


class Conv(nn.Module):
    """Convolution without bias, BatchNorm, SiLU; `stride` divides H and W."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False
        )
        self.norm = MicroBatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the three in turn."""
        return F.silu(self.norm(self.conv(x)))


class Bottleneck(nn.Module):
    """1×1 then 3×3 convolution, with a residual connection where asked for."""

    def __init__(self, channels: int, shortcut: bool):
        super().__init__()
        self.reduce = Conv(channels, channels, 1)
        self.expand = Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Shape in = shape out, `[B, channels, H, W]`."""
        y = self.expand(self.reduce(x))
        return x + y if self.shortcut else y


class C3(nn.Module):
    """Cross-stage partial block with three convolutions.

    Half of the channels pass the bottlenecks, half go round them.
    """

    def __init__(self, in_channels: int, out_channels: int, repeats: int, shortcut: bool):
        super().__init__()
        hidden = out_channels // 2
        self.main = Conv(in_channels, hidden, 1)
        self.bypass = Conv(in_channels, hidden, 1)
        self.blocks = nn.Sequential(*(Bottleneck(hidden, shortcut) for _ in range(repeats)))
        self.fuse = Conv(2 * hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` → `[B, out, H, W]`."""
        return self.fuse(torch.cat((self.blocks(self.main(x)), self.bypass(x)), dim=1))
