"""Optimizer groups and the learning rate of each step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..model.backbone import Backbone
from ..model.detector import Detector
from .config import OptimizerSection, RecipeError, ScheduleSection
from .stage0 import CheckedAdamW, CheckedSGD


def parameter_groups(model: Detector, options: OptimizerSection) -> list[dict[str, Any]]:
    """Groups with `lr_scale`, `weight_decay` and `is_bias`: backbone by depth, neck and head.

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
    named = [n for module in rest for n in module.named_parameters() if n[1].requires_grad]
    weights = [p for _, p in named if p.ndim > 1]
    biases = [p for name, p in named if p.ndim <= 1 and name.endswith("bias")]
    scales = [p for name, p in named if p.ndim <= 1 and not name.endswith("bias")]
    groups.append({"params": weights, "lr_scale": 1.0, "weight_decay": decay})
    groups.append({"params": scales, "lr_scale": 1.0, "weight_decay": 0.0})
    groups.append({"params": biases, "lr_scale": 1.0, "weight_decay": 0.0, "is_bias": True})
    return groups


def build_optimizer(
    model: Detector, options: OptimizerSection, stage: int
) -> torch.optim.Optimizer:
    """A torch optimizer: DeepSpeed shards it at `stage`, and compiles none of its own."""
    groups = parameter_groups(model, options)
    adamw, sgd = (torch.optim.AdamW, torch.optim.SGD) if stage else (CheckedAdamW, CheckedSGD)
    optimizer: torch.optim.Optimizer
    if options.name == "adamw":
        optimizer = adamw(groups, lr=options.lr, betas=options.betas)
    else:
        momentum = options.momentum
        optimizer = sgd(groups, lr=options.lr, momentum=momentum, nesterov=momentum > 0)
    if isinstance(optimizer, CheckedAdamW | CheckedSGD):
        optimizer.clip = options.clip
    return optimizer


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Lets parameters stay as they are: those of these names, or whose names begin so.

    Raises:
        RecipeError: no parameter is called so, or none would be left to train.
    """
    for prefix in prefixes:
        frozen = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            raise RecipeError(
                f"optimizer.freeze: {prefix}: no parameter's name begins so; names look like "
                f"{next(name for name, _ in model.named_parameters())}"
            )
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError("optimizer.freeze: leaves no parameter to train; name fewer")


def moment_names(optimizer: str) -> tuple[str, ...]:
    """The tensors that the optimizer keeps for every parameter."""
    return ("exp_avg", "exp_avg_sq") if optimizer == "adamw" else ("momentum_buffer",)


def lr_factor(step: int, steps_per_epoch: int, options: ScheduleSection) -> float:
    """Learning rate at a step as a share of its peak: warm-up, then the decay."""
    total, warmup = total_steps(steps_per_epoch, options), _warmup(steps_per_epoch, options)
    warmed_up = warmup_share(step, steps_per_epoch, options)
    if options.decay == "linear":  # over the whole run, warm-up included, as YOLOv5's
        return warmed_up * (1 - (1 - options.final) * step / total)
    done = max(0.0, (step - warmup) / max(1, total - warmup))
    if options.decay == "flat_cosine":  # flat for the first half, as RTMDet trains
        done = max(0.0, 2 * done - 1)
    return warmed_up * (options.final + (1 - options.final) * (1 + math.cos(math.pi * done)) / 2)


def warmup_share(step: int, steps_per_epoch: int, options: ScheduleSection) -> float:
    """How much of the warm-up is done at a step, in (0, 1]."""
    return min(1.0, (step + 1) / (_warmup(steps_per_epoch, options) + 1))


def _warmup(steps_per_epoch: int, options: ScheduleSection) -> int:
    total = total_steps(steps_per_epoch, options)
    return min(round(options.warmup_epochs * steps_per_epoch), total // 2)


def total_steps(steps_per_epoch: int, options: ScheduleSection) -> int:
    """Global steps of the whole run."""
    return max(1, round(options.epochs * steps_per_epoch))


def set_hyperparameters(
    optimizer: Any, lr: float, warmed_up: float, options: OptimizerSection
) -> None:
    """Sets the learning rate of every group, each by its own scale.

    YOLOv5's SGD warms up in more than that: its momentum rises, and its biases come down from a
    high rate of their own while all else comes up. (With layer-wise decay, which is not YOLOv5's,
    those of the backbone come up as its weights do.)

    Args:
        optimizer: torch's, or DeepSpeed's round it.
        lr: of this step.
        warmed_up: share of the warm-up that is done.
        options: of the recipe.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if options.name == "sgd" and group.get("is_bias") and warmed_up < 1:
            group["lr"] += options.warmup_bias_lr * (1 - warmed_up)
        if options.name == "sgd":
            start = options.warmup_momentum
            group["momentum"] = start + (options.momentum - start) * warmed_up


def group_rates(optimizer: Any) -> dict[str, float]:
    """The learning rate of the optimizer's groups now, by what sets it apart."""
    return {
        "biases" if group.get("is_bias") else f"scale {group['lr_scale']:.4g}": group["lr"]
        for group in optimizer.param_groups
    }
