"""Optimizer groups and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import nn

from ..model.backbone import Backbone
from ..model.detector import Detector
from .config import OptimizerSection, RecipeError, ScheduleSection


def parameter_groups(model: Detector, options: OptimizerSection) -> list[dict[str, Any]]:
    """Groups with `lr_scale` and `weight_decay`: backbone by depth, then neck and head.

    Norms, biases and layer scales, that is all vectors, do not decay. With `layer_decay` d, a
    backbone layer n layers below the top learns at d^n (Clark et al., ELECTRA, 2020; ConvNeXt,
    2022).
    """
    decay = options.weight_decay
    if options.layer_decay < 1:
        from timm.optim import param_groups_layer_decay

        if not isinstance(model.backbone, Backbone):
            raise RecipeError(
                f"optimizer.layer_decay = {options.layer_decay}: only timm's backbones have layers "
                "to decay over; set it to 1"
            )
        groups: list[dict[str, Any]] = [
            {key: group[key] for key in ("params", "lr_scale", "weight_decay")}
            for group in param_groups_layer_decay(
                model.backbone.trunk, weight_decay=decay, layer_decay=options.layer_decay
            )
        ]
        rest: list[nn.Module] = [model.neck, model.head]
    else:
        groups, rest = [], [model]
    parameters = [p for module in rest for p in module.parameters() if p.requires_grad]
    weights = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups.append({"params": weights, "lr_scale": 1.0, "weight_decay": decay})
    groups.append({"params": vectors, "lr_scale": 1.0, "weight_decay": 0.0})
    return groups


def build_optimizer(model: Detector, options: OptimizerSection) -> torch.optim.Optimizer:
    """A torch optimizer: DeepSpeed shards it, and compiles none of its own."""
    groups = parameter_groups(model, options)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas)
    momentum = options.momentum
    return torch.optim.SGD(groups, lr=options.lr, momentum=momentum, nesterov=momentum > 0)


def moment_names(optimizer: str) -> tuple[str, ...]:
    """The tensors that the optimizer keeps for every parameter."""
    return ("exp_avg", "exp_avg_sq") if optimizer == "adamw" else ("momentum_buffer",)


def lr_factor(step: int, steps_per_epoch: int, options: ScheduleSection) -> float:
    """Learning rate at a step as a share of its peak: warm-up, then the decay."""
    total = total_steps(steps_per_epoch, options)
    warmup = min(round(options.warmup_epochs * steps_per_epoch), total // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if options.decay == "linear":
        return 1 - (1 - options.final) * done
    if options.decay == "flat_cosine":  # flat for the first half, as RTMDet trains
        done = max(0.0, 2 * done - 1)
    return options.final + (1 - options.final) * (1 + math.cos(math.pi * done)) / 2


def total_steps(steps_per_epoch: int, options: ScheduleSection) -> int:
    """Global steps of the whole run."""
    return max(1, round(options.epochs * steps_per_epoch))


def set_lr(optimizer: Any, lr: float) -> None:
    """Sets the learning rate of every group, each by its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
