"""The moving average of the weights, at every ZeRO stage.

Invariant: after each global step, average = d·average + (1 - d)·weights with
d = decay·(1 - e^(-step / ramp)), exactly what one process would keep. At stages 0 to 2 every rank
has whole parameters and averages them; at stage 3 every rank averages its own shards, and whole
tensors exist only while they are gathered for a checkpoint or an evaluation.
BatchNorm's statistics are averaged like weights; integer buffers are copied.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import EmaSection


class Ema:
    """Keeps the average of a model's parameters and buffers."""

    def __init__(self, model: nn.Module, options: EmaSection):
        self.model, self.options = model, options
        self._parameters = dict(model.named_parameters())
        with torch.no_grad():
            self.shadow = {name: t.detach().clone() for name, t in _local(model).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follows the model after global step number `step` (from 1)."""
        decay = self.options.decay * (1 - math.exp(-step / self.options.ramp_steps))
        averages, values = [], []
        for name, value in _local(self.model).items():
            if value.is_floating_point():
                averages.append(self.shadow[name])
                values.append(value)
            else:
                self.shadow[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def gather(self) -> dict[str, Tensor]:
        """The whole averaged state by name, on every rank. Collective at stage 3."""
        return {name: self.gather_one(name) for name in self.shadow}

    def gather_one(self, name: str) -> Tensor:
        """One whole averaged tensor, on every rank. Collective at stage 3."""
        shard, parameter = self.shadow[name], self._parameters.get(name)
        return shard if parameter is None else whole_of(parameter, shard)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Takes a whole averaged state over; a rank keeps its shards of it."""
        for name, shard in self.shadow.items():
            value = state[name].to(shard.device)
            if hasattr(self._parameters.get(name), "ds_tensor"):
                value = shard_of(value, shard.numel())
            shard.copy_(value)


def shard_of(whole: Tensor, size: int) -> Tensor:
    """This rank's shard, `size` numbers, of a tensor that ZeRO-3 flattens, pads and splits."""
    flat = whole.flatten()
    padding = size * dist.get_world_size() - flat.numel()
    return nn.functional.pad(flat, (0, padding)).narrow(0, size * dist.get_rank(), size)


def whole_of(parameter: Any, shard: Tensor) -> Tensor:
    """The tensor that this rank holds `shard` of, shaped as the model's. Collective at stage 3."""
    if not hasattr(parameter, "ds_tensor"):
        return shard
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard.contiguous())
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def _local(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds: whole tensors, or at stage 3 its shards of the parameters."""
    held: dict[str, Tensor] = {
        name: parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data
        for name, parameter in model.named_parameters()
    }
    persistent = model.state_dict(keep_vars=True).keys()
    held.update({name: b for name, b in model.named_buffers() if name in persistent})
    return held
