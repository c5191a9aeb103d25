"""Export: from a sharded checkpoint to one safetensors file that stands alone."""

from pathlib import Path

from ..model.detector import without_pretrained
from ..model.weights import WeightsInfo, save_weights
from .checkpoint import CheckpointError, load_checkpoint, newest_checkpoint
from .config import Recipe


def export(
    run: Path, output: Path, checkpoint: Path | None = None, averaged: bool = True
) -> tuple[str, int]:
    """Exports a run's newest checkpoint, or a given one.

    Args:
        run: the run's folder.
        output: the safetensors file to write.
        checkpoint: a checkpoint folder instead of the run's newest.
        averaged: the EMA weights rather than the last ones.

    Returns:
        The sha256 over the tensors in the order of their names, and the step.

    Raises:
        CheckpointError: there is nothing to export.
    """
    found = load_checkpoint(checkpoint) if checkpoint else newest_checkpoint(run / "checkpoints")
    if found is None:
        raise CheckpointError(
            f"run {run}: no checkpoint in {run / 'checkpoints'}; train it first with "
            f"`convnext-yolo train --config … --run {run}`"
        )
    recipe = Recipe.model_validate(found.state["recipe"])
    # Exported weights replace the backbone's pretrained ones: nothing is left to fetch.
    architecture = without_pretrained(found.state["architecture"])
    info = WeightsInfo(
        architecture=architecture,
        classes=tuple(found.state["classes"]),
        image_px=recipe.data.image_px,
        step=found.step,
        recipe=recipe.to_yaml(),
        metrics=found.state["metrics"],
    )
    tensors = found.section("ema" if averaged else "model")
    return save_weights(output, tensors, info), found.step


def latest_export(run: Path) -> Path:
    """The run's `model.safetensors`, exported now if it is missing or older than the checkpoint."""
    output = run / "model.safetensors"
    latest = run / "checkpoints" / "latest"
    if not output.exists() or (latest.exists() and latest.stat().st_mtime > output.stat().st_mtime):
        export(run, output)
    return output
