"""What follows from a recipe alone, but takes torch, timm and perhaps DeepSpeed to find out.

The detector is built of shapes, without numbers. DeepSpeed is asked only where the recipe has keys
of its configuration.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .facts import RecipeFacts

FP32_BYTES = 4
CLASSES = 80  # of the data; the sizes hardly depend on it


def recipe_facts(configs: Sequence[str], options: Sequence[str], world_size: int) -> RecipeFacts:
    """Sizes of a recipe's model, and what DeepSpeed says of its options.

    Args:
        configs: recipe files, by absolute paths.
        options: `--key.sub value` words.
        world_size: ranks.
    """
    import torch

    from ...model.detector import build_detector, without_pretrained
    from ...recipes.build import architecture
    from ...recipes.config import RecipeError
    from ...recipes.load import load_recipe
    from ...recipes.optim import freeze, moment_names

    recipe = load_recipe([Path(file) for file in configs], options)
    found = RecipeFacts(shm_bytes=_ring_bytes(recipe))
    try:
        with torch.device("meta"):
            detector = build_detector(without_pretrained(architecture(recipe, CLASSES)))
        freeze(detector, recipe.optimizer.freeze)
    except Exception as error:
        if not hasattr(error, "exit_code"):  # a mistake that is not the user's
            raise
        found.error = str(error)
        return found
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    tensors = sum(t.numel() for t in detector.state_dict().values())
    moments = len(moment_names(recipe.optimizer.name))
    found.parameters = sum(p.numel() for p in detector.parameters())
    found.gradient_bytes = FP32_BYTES * trained
    found.checkpoint_bytes = FP32_BYTES * (2 * tensors + moments * trained)  # weights and average
    try:
        found.ignored = _ignored(recipe, world_size)
    except RecipeError as error:
        found.error = str(error)
    return found


def _ring_bytes(recipe: Any) -> int:
    """Shared memory of a rank's loader, as `data_prep.ring` takes it."""
    from ...data_prep.ring import PREFETCH

    workers = min(recipe.data.workers, recipe.batch.micro)
    if not workers:
        return 0
    height, width = recipe.data.image_px
    frames = -(-recipe.batch.micro // workers)
    return workers * (PREFETCH + 1) * frames * height * width * 3


def _ignored(recipe: Any, world_size: int) -> list[str]:
    """Those of the recipe's own keys for DeepSpeed that it passes over.

    Raises:
        RecipeError: options that contradict the recipe, or that DeepSpeed refuses.
    """
    from ...data_prep.stream import BatchPlan
    from ...recipes.deepspeed_options import ignored_options
    from ...recipes.engine import deepspeed_config

    total, micro = recipe.batch.global_size, recipe.batch.micro
    fits = total % (micro * world_size) == 0
    plan = BatchPlan(total, micro, 0, world_size if fits else 1)
    config = deepspeed_config(recipe, plan)
    if not recipe.deepspeed.options:
        return []
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    config["train_batch_size"] = micro * config["gradient_accumulation_steps"]  # it counts us alone
    return ignored_options(config, recipe.deepspeed.options)
