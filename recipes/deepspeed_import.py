"""`import --deepspeed`: the weights out of a checkpoint that DeepSpeed itself wrote.

Stages 0 to 2 have the whole module in one file, stage 3 only its buffers; at stages 1 to 3 each
rank's file has its part of the fp32 weights, parameters end to end, of each optimizer group:

    mp_rank_00_model_states.pt                  stages 0 to 2
    zero_pp_rank_R_mp_rank_00_model_states.pt   stage 3
    zero_pp_rank_R_mp_rank_00_optim_states.pt   stages 1 to 3

The files are pickles. torch reads them with `weights_only`, and the few DeepSpeed classes inside
become inert stand-ins, so that nothing is executed and DeepSpeed is not imported.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..data_prep.source import load_manifest
from ..model.detector import build_detector, without_pretrained
from ..model.weights import WeightsInfo, save_weights
from .build import architecture
from .checkpoint import CheckpointError
from .config import Recipe
from .native import CLIENT_STATE


class _Inert:
    """Stands for an object of DeepSpeed's that holds no weights."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# All that a checkpoint of DeepSpeed 0.19 names beside torch's tensors.
_STAND_INS: list[Any] = [
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def import_deepspeed(directory: Path, output: Path, recipe: Recipe | None = None) -> str:
    """Writes the weights of a native checkpoint, as they were last, to a weights file.

    Args:
        directory: what `engine.save_checkpoint` was given, or the folder of one checkpoint in it.
        output: the safetensors file to write.
        recipe: says the architecture, the frame and, by its training shards, the classes; None:
            our runs have put them into the checkpoint.

    Returns:
        What was written, in two lines.

    Raises:
        CheckpointError: no such checkpoint, incomplete, unsafe, or of another model.
        DataError: unreadable shards. WeightsError: the file can't be written.
    """
    folder = _checkpoint_folder(directory)
    try:
        models, shards = _read_all(folder)
        tensors = consolidate(models, shards)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"DeepSpeed checkpoint {folder}: its tensors can't be put together ({error!r}); it is "
            "damaged, or of a DeepSpeed that writes otherwise than 0.19"
        ) from error
    info = _describe(folder, models[0], recipe)
    try:
        detector = build_detector(without_pretrained(info.architecture))
        detector.load_state_dict(tensors)
    except Exception as error:  # what the checkpoint says of itself can be wrong in any way
        detail = (str(error).strip().splitlines() or [repr(error)])[-1].strip()
        raise CheckpointError(
            f"DeepSpeed checkpoint {folder}: its tensors are not those of "
            f"{info.architecture.get('name')} ({detail}); give the recipe of its model with "
            "--config"
        ) from error
    sha256 = save_weights(output, tensors, info)
    kind = f"ZeRO shards of {len(shards)} ranks" if shards else "no ZeRO shards"
    return f"{output}: weights of step {info.step}, {kind}\nweights sha256 {sha256}"


def _checkpoint_folder(directory: Path) -> Path:
    """The folder with the `.pt` files."""
    latest = directory / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(tag).name != tag or tag in ("", "..") or not (directory / tag).is_dir():
            raise CheckpointError(
                f"DeepSpeed checkpoint {latest}: names {tag!r}, which is not there; name the "
                "checkpoint's own folder instead"
            )
        return directory / tag
    return directory


def _read_all(folder: Path) -> tuple[list[Any], list[Any]]:
    """What the model files and the optimizer files hold, each in the order of the ranks."""
    rank = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for path in folder.glob("*_states.pt"):
        if match := rank.fullmatch(path.name):
            found[match[2]][int(match[1])] = path
        elif path.name == "mp_rank_00_model_states.pt":
            found["model"][0] = path
        else:
            raise CheckpointError(
                f"DeepSpeed checkpoint {path}: is of a model that was split or has experts; only "
                "data-parallel runs can be imported"
            )
    if not found["model"]:
        raise CheckpointError(
            f"DeepSpeed checkpoint {folder}: holds no *_model_states.pt; name the folder that "
            "engine.save_checkpoint was given, as in RUN/checkpoints/STEP/native"
        )
    models, shards = ([_read(files[r]) for r in sorted(files)] for files in found.values())
    counts = [shard["optimizer_state_dict"]["partition_count"] for shard in shards[:1]]
    wanted = max(counts[0]) if counts and isinstance(counts[0], list) else sum(counts)
    is_zero = bool(models[0].get("param_shapes"))
    if len(shards) != wanted or (is_zero and not shards) or len(models) not in (1, wanted):
        raise CheckpointError(
            f"DeepSpeed checkpoint {folder}: incomplete, with files of {len(shards)} of "
            f"{wanted or 'its'} ranks; copy those of all nodes there, or take the one before"
        )
    return models, shards


def _read(path: Path) -> Any:
    """One file. Raises CheckpointError where it holds more than data."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {name[1]}, which is not data" if name else "is damaged, or not only data"
        raise CheckpointError(
            f"DeepSpeed checkpoint {path}: {what}, so nothing of it was used; save it with a "
            "client state of plain numbers, strings, lists and dicts"
        ) from error
    except Exception as error:  # a damaged file breaks the reader in any way
        raise CheckpointError(
            f"DeepSpeed checkpoint {path}: can't be read ({type(error).__name__}: {error}); copy "
            "it again, or take the one before"
        ) from error
    part = "optimizer_state_dict" if path.name.endswith("_optim_states.pt") else "module"
    if not isinstance(content, dict) or not isinstance(content.get(part), dict):
        raise CheckpointError(
            f"DeepSpeed checkpoint {path}: has no {part!r}; only what engine.save_checkpoint "
            "wrote can be imported"
        )
    return content


def consolidate(models: Sequence[Any], shards: Sequence[Any]) -> dict[str, Tensor]:
    """All tensors of the model by name, floats in 32 bits, in the order of its state dict.

    Args:
        models: what the model files hold, of one rank or at stage 3 of all.
        shards: what the optimizer files hold, rank by rank; none at stage 0.

    Raises:
        ValueError, KeyError, RuntimeError and such: parts that do not fit together.
    """
    state, world = models[0], len(shards)
    # Buffers and, but for stage 3, frozen and trained parameters; the latter perhaps in 16 bits.
    tensors: dict[str, Tensor] = dict(state["module"])
    groups = [shard["optimizer_state_dict"] for shard in shards]
    if shards and groups[0]["zero_stage"] == 3:
        for name, shape in (state.get("frozen_param_shapes") or {}).items():
            parts = [model["frozen_param_fragments"][name].flatten() for model in models]
            tensors[name] = torch.cat(parts)[: shape.numel()].view(shape)
        flat = [torch.cat([part.flatten() for part in g["fp32_flat_groups"]]) for g in groups]
        shapes = {name: s for group in state["param_shapes"] for name, s in group.items()}
        tensors |= _split_by_parameter(flat, shapes)
    elif shards:
        paddings = groups[0].get("param_alignment_paddings")
        for number, shapes in enumerate(state["param_shapes"]):
            flat = [g["single_partition_of_fp32_groups"][number].flatten() for g in groups]
            gaps = paddings[number] if paddings else [0] * len(shapes)
            tensors |= _split_end_to_end(torch.cat(flat), shapes, gaps, 2 * world)
    for name, original in (state.get("shared_params") or {}).items():
        tensors[name] = tensors[original]
    return {
        # Copies: safetensors takes no two names for one memory.
        name: (tensor.float() if tensor.is_floating_point() else tensor).clone()
        for name, tensor in tensors.items()
    }


def _split_end_to_end(
    flat: Tensor, shapes: dict[str, torch.Size], gaps: Sequence[int], alignment: int
) -> dict[str, Tensor]:
    """Stages 1 and 2: the ranks' parts make one line of parameters, each with a gap behind it."""
    offset, result = 0, {}
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        result[name] = flat.narrow(0, offset, shape.numel()).view(shape)
        offset += shape.numel() + gap
    if abs(flat.numel() - offset) >= alignment:
        raise ValueError(f"{offset} numbers of parameters in shards of {flat.numel()}")
    return result


def _split_by_parameter(flat: Sequence[Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Stage 3: every rank has an equal part of each parameter, the last one's padded."""
    offset, result = 0, {}
    for name, shape in shapes.items():
        size = -(-shape.numel() // len(flat))
        parts = torch.cat([part.narrow(0, offset, size) for part in flat])
        result[name] = parts[: shape.numel()].view(shape)
        offset += size
    if any(part.numel() != offset for part in flat):
        raise ValueError(f"{offset} numbers of parameters in shards of {flat[0].numel()}")
    return result


def _describe(folder: Path, state: dict[str, Any], recipe: Recipe | None) -> WeightsInfo:
    """Architecture, classes and frame: of the recipe, or as our runs put them there."""
    if recipe:
        classes = [
            {"id": c.id, "name": c.name}
            for c in load_manifest(recipe.data.train, recipe.data.patience_s).classes
        ]
        own: dict[str, Any] = {
            "architecture": architecture(recipe, len(classes)),
            "classes": classes,
            "step": state.get("global_steps", 0),
            "metrics": {},
        }
    elif CLIENT_STATE not in state:
        raise CheckpointError(
            f"DeepSpeed checkpoint {folder}: does not say what its model is, as another program "
            "wrote it; name the recipe of the model with --config, and its shards with --data"
        )
    else:
        own = state[CLIENT_STATE]
    try:
        recipe = recipe or Recipe.model_validate(own["recipe"])
        return WeightsInfo(
            architecture=without_pretrained(own["architecture"]),
            classes=tuple(own["classes"]),
            image_px=recipe.data.image_px,
            step=int(own["step"]),
            recipe=recipe.to_yaml(),
            metrics=own["metrics"],
        )
    except (KeyError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]  # pydantic's runs over lines
        raise CheckpointError(
            f"DeepSpeed checkpoint {folder}: its {CLIENT_STATE!r} is damaged or of another version "
            f"({type(error).__name__}: {detail}); name the recipe of the model with --config"
        ) from error
