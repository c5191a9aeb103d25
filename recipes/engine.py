"""DeepSpeed, made from the recipe: batch arithmetic, configuration, engine, batch statistics.

global batch = micro-batch x accumulation x world size. The recipe fixes the first two; the
accumulation follows from the world size. Losses are means within a micro-batch and gradients
means over micro-batches, so every world size computes the same step.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist

from ..data_prep.stream import BatchPlan
from ..model.detector import Detector
from ..model.norms import micro_batch_norms
from .config import Recipe, RecipeError
from .deepspeed_options import ignored_options
from .distributed import World
from .optim import build_optimizer, freeze
from .precision import autocast_fp16
from .shares import fitting_ranks


def batch_plan(recipe: Recipe, world: World) -> BatchPlan:
    """Who makes which part of the global batch.

    Raises:
        RecipeError: sizes that do not divide, with those that would.
    """
    total, micro = recipe.batch.global_size, recipe.batch.micro
    parts = total // micro
    if parts % world.size:
        fitting = map(str, fitting_ranks(total, micro))
        raise RecipeError(
            f"batch.global = {total} in micro-batches of {micro} makes {parts} of them, which "
            f"{world.size} processes can't share equally; start {' or '.join(fitting)} processes, "
            "or change batch.global or batch.micro"
        )
    return BatchPlan(total, micro, world.rank, world.size)


BUCKET = 30_000_000  # numbers that are reduced at a time

# DeepSpeed's keys that some key of the recipe stands for, and those that it no longer has.
INSTEAD = {
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "deepspeed.precision",
    "bf16": "deepspeed.precision",
    "bfloat16": "deepspeed.precision",
    "amp": "deepspeed.precision",
    "torch_autocast": "deepspeed.precision",
    "activation_checkpointing": "deepspeed.activation_checkpointing",
    "checkpoint": "checkpoint",
    "wandb": "tracking.wandb",
    "tensorboard": "tracking.tensorboard",
    "comet": "tracking.comet",
    "csv_monitor": "tracking (metrics.jsonl is always written)",
}
REMOVED = ("elasticity", "nebula", "curriculum_learning", "data_efficiency", "autotuning")


def deepspeed_config(recipe: Recipe, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's configuration. `deepspeed.options` of the recipe adds keys, and overrides none.

    Raises:
        RecipeError: an option that the recipe already decides, or that DeepSpeed has dropped.
    """
    stage = recipe.deepspeed.stage
    config: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": recipe.optimizer.clip if stage else 0.0,  # there: see stage0
        "zero_optimization": {"stage": stage},
        # Ours is a torch optimizer: DeepSpeed's own would compile for minutes at first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if recipe.deepspeed.precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        if stage == 3:
            # Else small parameters arrive rounded to bf16 in an engine's first step, and whole in
            # all others: a run that is gone on with would part from one that was not stopped.
            config["torch_autocast"]["lower_precision_safe_modules"] = []
    for key in recipe.deepspeed.options:
        if key in INSTEAD:
            raise RecipeError(
                f"deepspeed.options.{key}: the recipe says that in {INSTEAD[key]}; set it there "
                "and drop this"
            )
        if key in REMOVED:
            raise RecipeError(
                f"deepspeed.options.{key}: is not there in this DeepSpeed, or contradicts a fixed "
                "global batch; drop it"
            )
    _merge_options(config, recipe.deepspeed.options, "deepspeed.options")
    # DeepSpeed's own, 5e8 numbers, is allocated whole: gigabytes beside a model of megabytes.
    config["zero_optimization"].setdefault("reduce_bucket_size", BUCKET)
    return config


def _merge_options(config: dict[str, Any], options: dict[str, Any], path: str) -> None:
    for key, value in options.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge_options(config[key], value, f"{path}.{key}")
        elif key in config and config[key] != value:
            raise RecipeError(
                f"{path}.{key} = {value!r} contradicts {config[key]!r}, which follows from the "
                "recipe's own keys; drop it"
            )
        else:
            config[key] = value


def build_engine(recipe: Recipe, model: Detector, plan: BatchPlan) -> Any:
    """Wraps the model, whose weights must be loaded by now, into a DeepSpeed engine.

    Raises:
        RecipeError: options that DeepSpeed or the recipe's other keys forbid.
    """
    import deepspeed

    options = recipe.deepspeed
    config = deepspeed_config(recipe, plan)
    for key in ignored_options(config, options.options) if options.options else ():
        if plan.rank == 0:
            print(f"warning: deepspeed.options.{key}: DeepSpeed does not know it", file=sys.stderr)
    freeze(model, recipe.optimizer.freeze)
    if options.activation_checkpointing:
        model.backbone.checkpoint_activations()
    optimizer = build_optimizer(model, recipe.optimizer, options.stage)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if options.precision == "fp16":
        autocast_fp16(engine.module, engine.device.type)
    if options.compile:
        engine.compile()
    return engine


@torch.no_grad()
def commit_batch_statistics(model: Detector, plan: BatchPlan, applied: bool) -> None:
    """Moves BatchNorm's running statistics once, by the mean over the global batch.

    Those of a step that was not applied are forgotten.
    """
    norms = micro_batch_norms(model)
    pending = [norm.take_pending() for norm in norms]  # [2, channels] each
    if not norms or not applied:
        return
    flat = torch.cat([p.flatten() for p in pending])
    dist.all_reduce(flat)
    flat /= plan.world_size
    sizes = [p.numel() for p in pending]
    for norm, part in zip(norms, flat.split(sizes), strict=True):
        mean, var = part.view(2, -1)
        norm.move_running(mean, var)
