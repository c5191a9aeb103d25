"""Sharded checkpoints: tensors by name, the same at any ZeRO stage and number of ranks.

A checkpoint is a folder `step-NNNNNNNN` of safetensors parts and a manifest with their hashes.
Tensors are named `model/…`, `ema/…` and `<moment>/…`; names and sizes alone decide which part a
tensor is in, and ranks share the parts among them.

Invariants:
1. A folder with the final name is complete: parts and manifest are written and synced in a
   `.partial` folder, which is then renamed. A kill at any moment leaves the last one loadable.
2. Reading trusts hashes, not names: a damaged checkpoint is named and the one before is used.
3. No pickle: nothing in a checkpoint can execute.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = "convnext-yolo checkpoint 1"
PART_BYTES = 64 * 2**20


class CheckpointError(Exception):
    """A checkpoint that can't be used. The text is one sentence."""

    exit_code = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    path: Path
    step: int
    state: dict[str, Any]  # whatever the writer put beside the tensors
    tensors: dict[str, Tensor]

    def section(self, name: str) -> dict[str, Tensor]:
        """The tensors under `name/`, without that prefix."""
        prefix = name + "/"
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Entry:
    """A tensor to be saved, and how to get it. `gather` is collective: every rank calls it."""

    name: str
    bytes: int
    gather: Callable[[], Tensor]


def save_checkpoint(
    folder: Path, step: int, entries: list[Entry], state: dict[str, Any], keep: int
) -> Path:
    """Writes and publishes a checkpoint; all ranks call it.

    Args:
        folder: the run's `checkpoints`.
        step: global steps done.
        entries: all tensors, in the same order on every rank.
        state: what else belongs to it; JSON.
        keep: how many published checkpoints stay.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    if rank == 0:
        for left in folder.glob("step-*.partial"):  # by a run that was killed while writing
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier()

    written: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(_parts(entries)):
        name, mine = f"part-{number:05d}.safetensors", number % world == rank
        tensors = {}
        for entry in part:
            tensor = entry.gather()
            if mine:
                tensors[entry.name] = tensor.detach().cpu().contiguous()
        if mine:
            written[name] = _write_part(partial / name, tensors)

    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, written)  # also the barrier: all parts are on disk
    if rank == 0:
        parts = {name: part for w in everyone for name, part in w.items()}
        manifest = {"format": FORMAT, "step": step, "state": state, "parts": parts}
        manifest["sha256"] = _manifest_sha256(manifest)
        _write_text(partial / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))
        _sync_folder(partial)
        partial.rename(final)
        _write_text(folder / "latest.partial", final.name)
        (folder / "latest.partial").replace(folder / "latest")
        _sync_folder(folder)
        _retire(folder, final, keep)
    dist.barrier()
    return final


def _retire(folder: Path, final: Path, keep: int) -> None:
    """Keeps the last few up to `final`, which was just published and is never deleted.

    Newer ones are of a branch that the run has left: damaged, or older than a `--resume PATH`.
    They would win the next `--resume auto`, so they are set aside.
    """
    for path in published(folder):
        if path.name > final.name:
            aside = path.with_name("set-aside-" + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"{path.name} is not of this run's past; set aside as {aside}", file=sys.stderr)
    for old in published(folder)[keep:]:
        shutil.rmtree(old)


def published(folder: Path) -> list[Path]:
    """The published checkpoints of a run, newest first."""
    names = re.compile(r"step-\d{8,}")
    return sorted((p for p in folder.glob("step-*") if names.fullmatch(p.name)), reverse=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint and checks every hash.

    Raises:
        CheckpointError: damaged, incomplete, or not a checkpoint; names the file.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: no readable manifest.json ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}: its manifest's format is not {FORMAT!r}")
    if manifest.pop("sha256", None) != _manifest_sha256(manifest):
        raise CheckpointError(f"checkpoint {path}: manifest.json is damaged (its sha256 differs)")
    tensors: dict[str, Tensor] = {}
    for name, part in manifest["parts"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path}: {name} is missing")
        if _sha256(file) != part["sha256"]:
            raise CheckpointError(f"checkpoint {path}: {name} is damaged (its sha256 differs)")
        tensors.update(load_file(file))
    return Checkpoint(path, manifest["step"], manifest["state"], tensors)


def find_checkpoint(folder: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to go on from: the main rank chooses, and all load the same.

    Args:
        folder: the run's `checkpoints`.
        resume: "auto", "never" or a checkpoint.

    Raises:
        CheckpointError: `never` where there are checkpoints, a path that does not load, or
            checkpoints of which none does.
    """
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            chosen[0] = _choose(folder, resume)
        except CheckpointError as error:
            chosen[0] = error
    dist.broadcast_object_list(chosen)
    if isinstance(chosen[0], CheckpointError):
        raise chosen[0]
    return None if chosen[0] is None else load_checkpoint(chosen[0])


def _choose(folder: Path, resume: str) -> Path | None:
    if resume not in ("auto", "never"):
        return Path(resume)
    newest = newest_checkpoint(folder) if resume == "auto" else None
    if newest is None and published(folder):
        why = "none of the checkpoints there can be used" if resume == "auto" else "it has some"
        raise CheckpointError(
            f"--resume {resume}: {folder}: {why}; remove that folder or choose another --run"
        )
    return newest.path if newest else None


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; a damaged one is named on stderr and passed over."""
    for path in published(folder):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    return None


def _parts(entries: list[Entry]) -> list[list[Entry]]:
    """Cuts the entries into parts of about PART_BYTES, by names and sizes alone."""
    parts: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not parts or entry.bytes > room:
            parts.append([])
            room = PART_BYTES
        parts[-1].append(entry)
        room -= entry.bytes
    return parts


def _write_part(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Makes renames in a folder last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def tensor_bytes(tensor: Any) -> int:
    """Bytes of a tensor when whole; ZeRO-3 leaves an empty one and the true size beside it."""
    size = getattr(tensor, "ds_numel", None) or tensor.numel()
    return int(size) * torch.empty(0, dtype=tensor.dtype).element_size()
