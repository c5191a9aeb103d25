"""What may change between a checkpoint and the recipe that resumes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint, published
from .config import Recipe
from .optim import total_steps

# Changing one of these in the middle of a run would break its arithmetic or its stream.
FIXED = ("seed", "model", "batch.global", "batch.micro", "optimizer.name", "optimizer.freeze")
# Within these, what a resume has no more use for, and what only weighs the losses.
FREE = ("model.weights", "model.backbone.weights", "model.backbone.pretrained", "model.loss")


def recipe_changes(recipe: Recipe, checkpoint: Checkpoint) -> list[str]:
    """Keys in which a recipe differs from the one that the checkpoint was written under.

    Raises:
        CheckpointError: one of them is fixed for the length of a run.
    """
    before = _flatten(checkpoint.state["recipe"])
    now = _flatten(recipe.model_dump(mode="json", by_alias=True))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    for key in keys:
        if _is_within(key, FIXED) and not _is_within(key, FREE):
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: its run has {key} = {before.get(key)!r}, the "
                f"recipe {now.get(key)!r}, and that can't change in the middle; set it back, or "
                "train into another folder with --run"
            )
    return [f"{key} {before.get(key)!r} → {now.get(key)!r}" for key in keys]


def with_found_micro_batch(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """A recipe that would search its micro-batch takes what the run has found at its beginning."""
    if not recipe.batch.find_micro:
        return recipe
    micro = checkpoint.state["recipe"]["batch"]["micro"]
    batch = recipe.batch.model_copy(update={"micro": micro})
    return recipe.model_copy(update={"batch": batch})


def _is_within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def is_finished(recipe: Recipe) -> bool:
    """Whether the recipe's run has published its last step, with that step's evaluation.

    Then `train` has nothing to do, whatever else has changed in the recipe since.
    """
    latest = published(Path(recipe.run) / "checkpoints")
    if not latest:
        return False
    try:
        checkpoint = load_checkpoint(latest[0])
    except CheckpointError:
        return False
    last = total_steps(checkpoint.state["steps_per_epoch"], recipe.schedule)
    is_evaluated = checkpoint.state["evaluated_step"] == checkpoint.step
    return checkpoint.step > last or (checkpoint.step == last and is_evaluated)


def check_data(checkpoint: Checkpoint, fingerprint: str, shards: str) -> None:
    """Raises CheckpointError where the shards are not those that the run began on."""
    if checkpoint.state["data_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: its run began on other training shards than {shards}; "
            "set data.train back to those, or train into another folder with --run"
        )


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flatten(branch, f"{path}.{name}" if path else str(name)).items()
    }
