"""YOLOv5's own files: tensors by upstream's names, and what the file says about the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import WeightsError
from .unpickle import Inert, StoredTensor, TorchArchive

MAX_DEPTH = 12  # of modules in modules; YOLOv5's are 6 deep


@dataclass(frozen=True)
class Upstream:
    """What a file of YOLOv5 holds."""

    tensors: dict[str, Tensor]  # by upstream's names
    names: Any  # of the classes: a list, or a dict by index
    yaml: Any  # the architecture as upstream writes it
    strides: list[float] | None = None  # pixels a cell, where it says so


def read_upstream(path: Path) -> Upstream:
    """Reads safetensors with upstream's key names, or else a `.pt`.

    Raises:
        WeightsError: a file that is missing, damaged, or holds no model.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)


def _read_safetensors(path: Path) -> Upstream:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names, yaml = (json.loads(metadata.get(key, "null")) for key in ("names", "yaml"))
    except FileNotFoundError as error:
        raise WeightsError(f"weights {path}: no such file; give one of YOLOv5's") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"weights {path}: not a readable safetensors file ({error}); fetch it again"
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"weights {path}: `names` or `yaml` in its metadata is no JSON ({error}); "
            "write both with json.dumps"
        ) from error
    return Upstream(tensors, names, yaml)


def _read_pt(path: Path) -> Upstream:
    archive = TorchArchive(path)
    saved = archive.root
    model = (saved.get("ema") or saved.get("model")) if isinstance(saved, dict) else saved
    if not isinstance(model, Inert):
        raise WeightsError(
            f"weights {path}: neither `ema` nor `model` in it is a model; "
            "give a .pt file as YOLOv5's training writes it"
        )
    tensors = {name: archive.tensor(t) for name, t in _stored(path, model, "").items()}
    stride = model.state.get("stride")
    strides = (
        archive.tensor(stride).flatten().tolist() if isinstance(stride, StoredTensor) else None
    )
    return Upstream(tensors, model.state.get("names"), model.state.get("yaml"), strides)


def _stored(path: Path, module: Any, prefix: str) -> dict[str, StoredTensor]:
    """What `state_dict` would have given, of a module that stands in for the real one."""
    if prefix.count(".") > MAX_DEPTH:
        raise WeightsError(
            f"weights {path}: its modules lie more than {MAX_DEPTH} deep in each other; "
            "give a .pt file as YOLOv5's training writes it"
        )
    found: dict[str, StoredTensor] = {}
    for name, tensor in [*_held(module, "_parameters"), *_held(module, "_buffers")]:
        if isinstance(tensor, StoredTensor):
            found[f"{prefix}{name}"] = tensor
    for name, child in _held(module, "_modules"):
        found |= _stored(path, child, f"{prefix}{name}.")
    return found


def _held(module: Any, kind: str) -> list[tuple[Any, Any]]:
    """Names and values of what a module keeps under an attribute."""
    held = module.state.get(kind) if isinstance(module, Inert) else None
    return list(held.items()) if isinstance(held, dict) else []
