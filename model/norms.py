"""Normalisation: GroupNorm for what is new, and a BatchNorm that is the same at any world size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP_CHANNELS = 8  # RTMDet-ConvNeXt: 32 groups of 256 channels


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm (Wu and He, 2018): nothing to synchronise between ranks, no running statistics."""
    groups = channels // GROUP_CHANNELS if channels % GROUP_CHANNELS == 0 else 1
    return nn.GroupNorm(groups, channels)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each cell, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` → the same shape; no copy where x is channels last."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MicroBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose running statistics move once a *global* step.

    Training normalises with the statistics of the micro-batch, as BatchNorm always does, and adds
    them to a sum. `commit_batch_statistics` then moves the running statistics by the mean over
    all micro-batches of the global batch. So the same recipe gives the same statistics at any
    world size and accumulation; ordinary BatchNorm moves them once a micro-batch of this rank.
    A forward pass that activation checkpointing repeats counts twice in sum and in count.
    The defaults are YOLOv5's.
    """

    pending_mean: Tensor
    pending_var: Tensor
    pending_count: Tensor

    def __init__(self, channels: int, eps: float = 1e-3, momentum: float = 0.03) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        # Between commits only: not part of a checkpoint, which is written at a step boundary.
        self.register_buffer("pending_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("pending_var", torch.zeros(channels), persistent=False)
        self.register_buffer("pending_count", torch.zeros(()), persistent=False)

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
            self.pending_count += 1
        return y

    def take_pending(self) -> Tensor:
        """Returns the means over this rank's micro-batches `[2, channels]` and forgets them."""
        count = self.pending_count.clamp(min=1)
        pending = torch.stack((self.pending_mean, self.pending_var)) / count
        for buffer in (self.pending_mean, self.pending_var, self.pending_count):
            buffer.zero_()
        return pending

    @torch.no_grad()
    def move_running(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics towards the global batch's mean statistics."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.momentum is not None and self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        self.num_batches_tracked += 1


class _MicroBatchNormAct2d(MicroBatchNorm2d):
    """Norm, dropout and activation in one, as timm's trunks have it; same parameter names."""

    def __init__(self, channels: int, eps: float, momentum: float, drop: nn.Module, act: nn.Module):
        super().__init__(channels, eps, momentum)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def replace_batch_norms(module: nn.Module) -> None:
    """Puts `MicroBatchNorm2d` in the place of each BatchNorm2d, its weights and names kept."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d) or isinstance(child, MicroBatchNorm2d):
            replace_batch_norms(child)
            continue
        # timm's subclass has an activation inside; torch's momentum of None is a running mean.
        momentum = 0.1 if child.momentum is None else child.momentum
        act, drop = getattr(child, "act", None), getattr(child, "drop", nn.Identity())
        new = (
            MicroBatchNorm2d(child.num_features, child.eps, momentum)
            if act is None
            else _MicroBatchNormAct2d(child.num_features, child.eps, momentum, drop, act)
        )
        new.load_state_dict(child.state_dict())
        setattr(module, name, new)


def micro_batch_norms(model: nn.Module) -> list[MicroBatchNorm2d]:
    """The norms whose running statistics wait for `move_running`, in the order of modules."""
    return [module for module in model.modules() if isinstance(module, MicroBatchNorm2d)]
