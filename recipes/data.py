"""The data of a recipe: its shards opened, and the training stream over them."""

import functools
from dataclasses import replace

from ..data_prep.augment import Augmentation
from ..data_prep.errors import DataError
from ..data_prep.reader import ShardReader
from ..data_prep.stream import BatchPlan, TrainStream
from ..model.letterbox import fit
from .build import cache_options
from .config import Recipe
from .optim import total_steps


def open_shards(recipe: Recipe) -> tuple[ShardReader, ShardReader]:
    """The training and the validation shards.

    Raises:
        DataError: they can't be read, or their classes differ.
    """
    cache = cache_options(recipe.data)
    train, val = (ShardReader(where, cache) for where in (recipe.data.train, recipe.data.val))
    if train.classes != val.classes:
        raise DataError(
            f"{recipe.data.val}: its classes are not those of {recipe.data.train}; "
            "shard both from annotations with the same categories"
        )
    return train, val


def training_stream(
    recipe: Recipe, reader: ShardReader, plan: BatchPlan, start_step: int = 0
) -> TrainStream:
    """The recipe's training batches of one rank, from a global step on."""
    steps_per_epoch = len(reader) // plan.global_batch
    return TrainStream(
        reader,
        plan,
        recipe.seed,
        start_step,
        recipe.data.image_px,
        functools.partial(augmentation_at, recipe, steps_per_epoch),
        fit,
        recipe.augment.on_device,
    )


def augmentation_at(recipe: Recipe, steps_per_epoch: int, step: int) -> Augmentation:
    """The strengths at a step: the last epochs go without mosaic."""
    options = recipe.augment
    others = {"weak_epochs", "on_device", "multi_scale"}
    strengths = Augmentation(**options.model_dump(exclude=others))
    last = total_steps(steps_per_epoch, recipe.schedule) - options.weak_epochs * steps_per_epoch
    return replace(strengths, mosaic=0.0) if step >= last else strengths
