"""From the sections of a recipe to the arguments that the other rooms take."""

import json
from dataclasses import replace
from typing import Any

from ..data_prep.augment import Augmentation
from .config import Recipe
from .evaluate import EvalSettings
from .optim import total_steps


def architecture(recipe: Recipe, classes: int) -> dict[str, Any]:
    """The arguments of `build_detector`."""
    model: dict[str, Any] = json.loads(recipe.model.model_dump_json(exclude={"weights", "loss"}))
    return {"classes": classes, **model}


def eval_settings(recipe: Recipe) -> EvalSettings:
    """How the recipe evaluates."""
    options = recipe.evaluation
    return EvalSettings(
        frame_px=recipe.data.image_px,
        batch=options.batch,
        workers=recipe.data.workers,
        confidence=options.confidence,
        iou=options.iou,
    )


def augmentation_at(recipe: Recipe, steps_per_epoch: int, step: int) -> Augmentation:
    """The strengths at a step: the last epochs go without mosaic."""
    options = recipe.augment
    strengths = Augmentation(**options.model_dump(exclude={"weak_epochs"}))
    last = total_steps(steps_per_epoch, recipe.schedule) - options.weak_epochs * steps_per_epoch
    return replace(strengths, mosaic=0.0) if step >= last else strengths
