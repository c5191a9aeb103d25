"""From the sections of a recipe to the arguments that the other rooms take."""

import json
from typing import Any

from ..data_prep.cache import CacheOptions
from .config import DataSection, Recipe
from .evaluate import EvalSettings


def architecture(recipe: Recipe, classes: int) -> dict[str, Any]:
    """The arguments of `build_detector`."""
    model: dict[str, Any] = json.loads(recipe.model.model_dump_json(exclude={"weights", "loss"}))
    return {"classes": classes, **model}


def cache_options(data: DataSection) -> CacheOptions:
    """How the shards of a URL are read."""
    return CacheOptions(data.cache, data.cache_gib, data.patience_s)


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
