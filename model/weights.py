"""Exported weights: one safetensors file that says all there is to know about itself.

Metadata (strings, as safetensors wants them): `format`, `architecture` (JSON arguments of
`build_detector`), `classes` (JSON list of `{"id", "name"}`), `image_px` (JSON `[height, width]`),
`recipe` (YAML), `step`, `metrics` (JSON), `sha256` (of the tensors in the order of their names).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .detector import Detector, build_detector, without_pretrained
from .errors import WeightsError

FORMAT = "convnext-yolo weights 1"


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says about itself."""

    architecture: dict[str, Any]
    classes: tuple[dict[str, Any], ...]  # {"id", "name"} in index order
    image_px: tuple[int, int]  # height, width
    step: int = 0
    recipe: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash over names, types, shapes and bytes of tensors in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(path: Path, tensors: Mapping[str, Tensor], info: WeightsInfo) -> str:
    """Writes a weights file in one atomic step; returns the sha256 of the tensors.

    Raises:
        WeightsError: the file can't be written there.
    """
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    sha256 = tensors_sha256(tensors)
    metadata = {
        "format": FORMAT,
        "architecture": json.dumps(info.architecture),
        "classes": json.dumps(info.classes),
        "image_px": json.dumps(info.image_px),
        "step": str(info.step),
        "recipe": info.recipe,
        "metrics": json.dumps(info.metrics),
        "sha256": sha256,
    }
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial, metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"weights {path}: can't be written ({error}); choose another place, or make room"
        ) from error
    return sha256


def read_info(path: Path) -> WeightsInfo:
    """Reads the metadata of a weights file.

    Raises:
        WeightsError: no such file, not safetensors, or not written by `export`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise WeightsError(
            f"weights {path}: no such file; `convnext-yolo export RUN --output {path}` makes one"
        ) from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"weights {path}: not a readable safetensors file ({error}); export the run again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"weights {path}: metadata `format` is {metadata.get('format')!r}, not {FORMAT!r}; "
            "only files written by `convnext-yolo export` can be used here"
        )
    try:
        return WeightsInfo(
            architecture=json.loads(metadata["architecture"]),
            classes=tuple(json.loads(metadata["classes"])),
            image_px=tuple(json.loads(metadata["image_px"])),
            step=int(metadata["step"]),
            recipe=metadata["recipe"],
            metrics=json.loads(metadata["metrics"]),
            sha256=metadata["sha256"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"weights {path}: its metadata is damaged ({error}); export the run again"
        ) from error


def load_detector(path: Path) -> tuple[Detector, WeightsInfo]:
    """Builds the detector of a weights file and fills it, in evaluation mode, on the CPU.

    Raises:
        WeightsError: as `read_info`, or tensors that do not fit the architecture or their hash.
    """
    info = read_info(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tensors_sha256(tensors) != info.sha256:
        raise WeightsError(f"weights {path}: tensors differ from their sha256; export again")
    try:
        # The recipe's pretrained weights were a start: here all weights come from the file.
        detector = build_detector(without_pretrained(info.architecture))
        detector.load_state_dict(tensors)
    except Exception as error:  # metadata can be wrong in any way
        raise WeightsError(
            f"weights {path}: tensors do not fit the architecture in its metadata; export the run "
            "again with this version"
        ) from error
    return detector.eval(), info


CLASS_OUTPUTS = ("head.convs.", "head.cls_convs.")  # the convolutions whose outputs are classes


def begin_from(detector: Detector, path: Path, class_names: Sequence[str]) -> list[str]:
    """Fills a detector that is to be trained with the weights of a file; fine-tuning.

    With other classes than the file's, or in another order, the convolutions whose outputs stand
    for classes stay as they are initialised.

    Args:
        detector: of the file's architecture, but for the number of classes.
        path: a file of `export` or `import`.
        class_names: of the data that it is to be trained on, in index order.

    Returns:
        The names of the tensors that stay.

    Raises:
        WeightsError: as `load_detector`, or the file holds another architecture.
    """
    learnt, info = load_detector(path)
    theirs, ours = learnt.state_dict(), detector.state_dict()
    has_classes = [entry["name"] for entry in info.classes] == list(class_names)
    for name in sorted(ours.keys() ^ theirs.keys()):
        where = "is not in the file" if name in ours else "is not in the recipe's model"
        raise WeightsError(f"weights {path}: {name} {where}; give weights of the same model")
    fresh = [] if has_classes else [name for name in ours if name.startswith(CLASS_OUTPUTS)]
    for name in ours:
        if name not in fresh and theirs[name].shape != ours[name].shape:
            raise WeightsError(
                f"weights {path}: {name} has the shape {tuple(theirs[name].shape)}, but the "
                f"recipe's model needs {tuple(ours[name].shape)}; give weights of the same model"
            )
    anchors = "head.anchors"  # what the boxes are relative to, so they belong to the weights
    if anchors in ours and not torch.equal(ours[anchors], theirs[anchors]):
        raise WeightsError(
            f"weights {path}: learnt with the anchors {theirs[anchors].tolist()}; "
            "set model.anchors to these"
        )
    detector.load_state_dict({**theirs, **{name: ours[name] for name in fresh}})
    return fresh
