"""Export: from a sharded checkpoint to one safetensors file that stands alone."""

from pathlib import Path

from pydantic import ValidationError

from ..model.detector import without_pretrained
from ..model.weights import WeightsInfo, save_weights
from .checkpoint import CheckpointError, load_checkpoint, newest_checkpoint
from .config import Recipe
from .onnx_export import ExportError, Suppression, export_onnx, need_packages
from .retention import BEST, LATEST


def export(
    run: Path, output: Path, checkpoint: Path | None = None, averaged: bool = True
) -> tuple[str, int]:
    """Exports a run's newest checkpoint, or a given one.

    Args:
        run: the run's folder.
        output: the safetensors file to write.
        checkpoint: a checkpoint folder instead of the run's newest, or "best" or "latest".
        averaged: the EMA weights rather than the last ones.

    Returns:
        The sha256 over the tensors in the order of their names, and the step.

    Raises:
        CheckpointError: there is nothing to export.
    """
    if checkpoint and checkpoint.name == str(checkpoint) in (LATEST, BEST):
        checkpoint = _pointed_to(run / "checkpoints" / checkpoint)
    found = load_checkpoint(checkpoint) if checkpoint else newest_checkpoint(run / "checkpoints")
    if found is None:
        raise CheckpointError(
            f"run {run}: no checkpoint in {run / 'checkpoints'}; train it first with "
            f"`convnext-yolo train --config … --run {run}`"
        )
    try:
        recipe = Recipe.model_validate(found.state["recipe"])
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(
            f"checkpoint {found.path}: was written by another version, whose {key} this one does "
            "not know; export it with that version"
        ) from None
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


def _pointed_to(pointer: Path) -> Path:
    try:
        return pointer.with_name(pointer.read_text(encoding="utf-8").strip())
    except OSError:
        raise CheckpointError(
            f"--checkpoint {pointer.name}: the run has none ({pointer} is missing); leave it out "
            "for the newest"
        ) from None


def export_command(
    source: Path,
    output: Path | None,
    checkpoint: Path | None,
    averaged: bool,
    onnx: Path | None,
    suppression: Suppression | None,
) -> None:
    """Exports a run, or turns exported weights into ONNX, and says what was written.

    Args:
        source: the run's folder, or exported weights.
        output: the safetensors file to write; for a run only.
        checkpoint, averaged: as in `export`.
        onnx: the ONNX file to write.
        suppression: what `onnx` does inside, if anything.

    Raises:
        CheckpointError, WeightsError, ExportError: a mistake, in one sentence.
    """
    if suppression and not onnx:
        raise ExportError("--onnx-nms: is about the ONNX file; name that too, as in --onnx W.onnx")
    if onnx:
        need_packages()  # before anything is written
    if source.is_file():
        if output or checkpoint or not averaged or not onnx:
            raise ExportError(
                f"{source}: is exported already, and becomes ONNX with --onnx W.onnx alone; for "
                "--output, --checkpoint and --no-ema name the run's folder"
            )
        weights = source
    elif output is None:
        raise ExportError(
            f"{source}: --output is missing; name the file, as in --output W.safetensors"
        )
    else:
        weights = output
        sha256, step = export(source, output, checkpoint, averaged)
        print(f"{output}: weights of step {step}, {_mib(output)}")
        print(f"weights sha256 {sha256}", flush=True)
    if onnx:
        difference_px = export_onnx(weights, onnx, suppression)
        print(
            f"{onnx}: ONNX {'with' if suppression else 'without'} suppression inside, "
            f"{_mib(onnx)}; within {difference_px:.1g} px of PyTorch in onnxruntime"
        )


def _mib(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def exported_weights(source: Path) -> Path:
    """A file of weights itself; of a run its `model.safetensors`.

    That is exported now if it is missing or older than the checkpoint.
    """
    if not source.is_dir():
        return source
    output = source / "model.safetensors"
    latest = source / "checkpoints" / "latest"
    if not output.exists() or (latest.exists() and latest.stat().st_mtime > output.stat().st_mtime):
        export(source, output)
    return output
