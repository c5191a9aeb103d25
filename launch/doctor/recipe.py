"""What can be wrong with a recipe on so many ranks, wherever it runs: facts in, findings out."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...recipes.config import Recipe
from ...recipes.shares import fitting_globals, fitting_micro, fitting_ranks
from .findings import Finding, error, several, warning

# What DeepSpeed 0.19 has no more (its runtime/config.py), and what to write instead.
REMOVED = {
    "nebula": "checkpoints are asynchronous already, see checkpoint.asynchronous",
    "compression_training": "there is no substitute",
    "amp": "set deepspeed.precision to bf16 or fp16",
    "quantize_training": "there is no substitute",
    "sparse_gradients": "a detector has no embeddings",
    "eigenvalue": "there is no substitute",
    "sparse_attention": "there is no substitute",
    "elasticity": "the recipe fixes the global batch, and any fitting number of ranks resumes it",
    "graph_harvesting": "there is no substitute; see deepspeed.compile",
    "curriculum_learning": "the recipe decides what is trained on; see augment.weak_epochs",
    "progressive_layer_drop": "set drop_path_rate in model.backbone.options",
}
REMOVED_ZERO = {
    "mics_shard_size": "MiCS is gone; use zero_hpz_partition_size",
    "mics_hierarchical_params_gather": "MiCS is gone",
    "zeropp_loco_param": "LoCo is gone",
}
ONE_BIT = ("onebitadam", "onebitlamb", "zerooneadam")
_DROP = "drop it from the recipe"


def check_batch(recipe: Recipe, world_size: int, what: str) -> list[Finding]:
    """global batch = micro-batch x accumulation x world size, in whole numbers.

    Args:
        recipe: whose batch is to be shared.
        world_size: ranks.
        what: where their number comes from.
    """
    total, micro = recipe.batch.global_size, recipe.batch.micro
    parts = total // micro
    if parts % world_size == 0:
        return []
    sizes = fitting_ranks(total, micro)
    fewer = max(n for n in sizes if n < world_size)
    others = " or ".join(map(str, fitting_globals(total, micro, world_size)))
    if fitting := fitting_micro(total, micro, world_size):
        others += f" or batch.micro to {fitting}"
    return [
        error(
            what,
            f"{world_size} ranks can't share batch.global = {total} in micro-batches of {micro}, "
            f"which makes {parts}",
            "every rank must have equally many of them in a step",
            f"start {fewer} ranks (all that divide: {', '.join(map(str, sizes))}), or set "
            f"batch.global to {others}",
        )
    ]


def check_options(recipe: Recipe) -> list[Finding]:
    """Keys of `deepspeed.options` that DeepSpeed has dropped, or that only others understand."""
    options = recipe.deepspeed.options
    found = [_removed(key, instead) for key, instead in REMOVED.items() if key in options]
    zero = options.get("zero_optimization")
    if isinstance(zero, Mapping):
        keys = [key for key in REMOVED_ZERO if key in zero]
        found += [_removed(f"zero_optimization.{key}", REMOVED_ZERO[key]) for key in keys]
    optimizer = options.get("optimizer")
    kind = str(optimizer.get("type")) if isinstance(optimizer, Mapping) else ""
    if kind.lower() in ONE_BIT:
        instead = "set optimizer.name to adamw or sgd; zero_quantized_gradients saves traffic"
        found.append(_removed(f"optimizer.type = {kind}", f"1-bit optimizers are gone, {instead}"))
    for path in _autos(options):
        found.append(
            error(
                f"deepspeed.options.{path}",
                "it is 'auto'",
                "only the Hugging Face trainer replaces that, DeepSpeed takes it for a value",
                "drop it: what the recipe has no key for has DeepSpeed's default",
            )
        )
    return found


def _removed(key: str, instead: str) -> Finding:
    return error(
        f"deepspeed.options.{key}",
        "DeepSpeed has removed it",
        "DeepSpeed refuses to start with it, or would train without a word about it",
        f"{_DROP}: {instead}",
    )


def _autos(options: Mapping[str, Any], path: str = "") -> list[str]:
    found = []
    for key, value in options.items():
        if isinstance(value, Mapping):
            found += _autos(value, f"{path}{key}.")
        elif value == "auto":
            found.append(f"{path}{key}")
    return found


def check_ignored(keys: list[str]) -> list[Finding]:
    """Keys that DeepSpeed never looks at."""
    return [
        warning(
            f"deepspeed.options.{key}",
            "DeepSpeed does not know it",
            "it passes over such a key without a word",
            "mend its spelling, or drop it",
        )
        for key in keys
    ]


def check_samples(
    recipe: Recipe, world_size: int, counts: Mapping[str, tuple[int, int]]
) -> list[Finding]:
    """Data that is too little for so many ranks.

    Args:
        recipe: whose data it is.
        world_size: ranks.
        counts: samples and shards of "train" and "val".
    """
    found = []
    samples, shards = counts.get("train", (0, 0))
    total, where = recipe.batch.global_size, f"data.train = {recipe.data.train}"
    if samples and samples < world_size:
        found.append(
            error(
                where,
                f"{world_size} ranks, but only {samples} samples",
                "a rank would have nothing to train on",
                f"start {samples} ranks at most, or shard more pictures",
            )
        )
    elif samples and samples < total:
        found.append(
            error(
                where,
                f"batch.global = {total}, but only {samples} samples",
                "an epoch would have no step",
                f"set batch.global to {samples} at most",
            )
        )
    if shards and samples >= world_size > shards:
        found.append(
            warning(
                where,
                f"{world_size} ranks, but only {shards} shard(s)",
                "several ranks read the same file at a time, which a file server likes less",
                "make more: `convnext-yolo shard --samples-per-shard` with a smaller number",
            )
        )
    samples, _ = counts.get("val", (0, 0))
    if samples and samples < world_size:
        found.append(
            warning(
                f"data.val = {recipe.data.val}",
                f"{world_size} ranks, but only {samples} samples",
                "some ranks wait in every evaluation",
                "hold back more pictures for validation",
            )
        )
    return found


def check_classes(recipe: Recipe, train: Sequence[str], val: Sequence[str]) -> list[Finding]:
    """The classes of both splits, which must be the same in the same order."""
    if not train or not val or list(train) == list(val):
        return []
    only = [name for name in train if name not in val] or [n for n in val if n not in train]
    which = f", as {several(only)}" if only else ", in another order"
    return [
        error(
            f"data.val = {recipe.data.val}",
            f"its {len(val)} classes are not the {len(train)} of data.train{which}",
            "an evaluation would compare one class with another",
            "shard both from annotations with the same categories",
        )
    ]


def check_resume(resume: str, checkpoints: int, run: str) -> list[Finding]:
    """`--resume never` where there is something to go on from."""
    if resume != "never" or not checkpoints:
        return []
    return [
        error(
            f"--resume never, run = {run}",
            f"it has {checkpoints} checkpoint(s) already",
            "a fresh run would mix with the old one, and is refused",
            "take --resume auto, another --run, or remove that folder's checkpoints",
        )
    ]
