"""Sharded checkpoints, read: tensors by name, the same at any ZeRO stage and number of ranks.

A checkpoint is a folder `step-NNNNNNNN` of safetensors parts and a manifest with their hashes;
`checkpoint_writer` writes it. Tensors are named `model/…`, `ema/…` and `<moment>/…`; what ZeRO had
split lies there in pieces `NAME@START`, which reading joins.

Invariants:
1. A folder with the final name is complete: parts and manifest are written and synced in a
   `.partial` folder, which is then renamed. A kill at any moment leaves the last one loadable: one
   of the same step that is in the way is `.replaced` until then, and counts while it is alone.
2. Reading trusts hashes, not names: a damaged checkpoint is named and the one before is used.
3. No pickle: nothing in a checkpoint can execute. (Native DeepSpeed files, which are pickles, may
   lie in it for other tools; they are never read here.)
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

FORMAT = "convnext-yolo checkpoint 3"
MANIFEST = "manifest.json"
SPLIT = "split"  # metadata of a part: the whole shapes of what it has pieces of
REPLACED = ".replaced"  # ends the name of a checkpoint whose step is being published again


class CheckpointError(Exception):
    """A checkpoint that can't be used. The text is one sentence."""

    exit_code = 2


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint. Its tensors stay on disk until they are asked for."""

    path: Path
    step: int
    state: dict[str, Any]  # whatever the writer put beside the tensors
    parts: dict[str, dict[str, Any]]  # by file name: its sha256 and bytes

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their full names."""
        return dict(self._read(""))

    def section(self, name: str) -> dict[str, Tensor]:
        """The tensors under `name/`, without that prefix."""
        prefix = name + "/"
        return {key.removeprefix(prefix): tensor for key, tensor in self._read(prefix)}

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Compares parts, all of them by default, with their hashes.

        Raises:
            CheckpointError: one is damaged or missing; names it.
        """
        for name in self.parts if files is None else files:
            file = self.path / name
            try:
                found = file_sha256(file)
            except FileNotFoundError:
                raise CheckpointError(f"checkpoint {self.path}: {name} is missing") from None
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint {self.path}: {name} can't be read ({error.strerror})"
                ) from None
            if found != self.parts[name]["sha256"]:
                raise CheckpointError(
                    f"checkpoint {self.path}: {name} is damaged (its sha256 differs)"
                )

    def _read(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        joined: dict[str, Tensor] = {}
        missing: dict[str, int] = {}
        for file in self.parts:
            if not file.endswith(".safetensors"):
                continue
            with safe_open(self.path / file, framework="pt") as part:
                split = json.loads((part.metadata() or {}).get(SPLIT, "{}"))
                for key in part.keys():  # noqa: SIM118, the file is no dictionary
                    if not key.startswith(prefix):
                        continue
                    tensor, (name, _, start) = part.get_tensor(key), key.rpartition("@")
                    if name not in split:
                        yield key, tensor
                        continue
                    if name not in joined:
                        joined[name] = torch.empty(split[name], dtype=tensor.dtype)
                        missing[name] = joined[name].numel()
                    joined[name].view(-1).narrow(0, int(start), tensor.numel()).copy_(tensor)
                    missing[name] -= tensor.numel()
        if lacking := [name for name, count in missing.items() if count]:
            raise CheckpointError(f"checkpoint {self.path}: has not all pieces of {lacking[0]}")
        yield from joined.items()


def load_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint and checks every hash.

    Raises:
        CheckpointError: damaged, incomplete, or not a checkpoint; names the file.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    return checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint by its manifest alone.

    Raises:
        CheckpointError: as above, but for its parts.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: no readable {MANIFEST} ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}: its manifest's format is not {FORMAT!r}")
    if manifest.pop("sha256", None) != manifest_sha256(manifest):
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged (its sha256 differs)")
    return Checkpoint(path, manifest["step"], manifest["state"], manifest["parts"])


def published(folder: Path) -> list[Path]:
    """The published checkpoints of a run, newest first."""
    names = re.compile(rf"step-\d{{8,}}({re.escape(REPLACED)})?")
    found = (path for path in folder.glob("step-*") if names.fullmatch(path.name))
    return sorted(
        (p for p in found if p.suffix != REPLACED or not p.with_suffix("").exists()), reverse=True
    )


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; a damaged one is named on stderr and passed over."""
    for path in published(folder):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    return None


def find_checkpoint(folder: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to go on from; all ranks call it, and share the reading of hashes.

    Args:
        folder: the run's `checkpoints`.
        resume: "auto", "never" or a checkpoint.

    Raises:
        CheckpointError: `never` where there are checkpoints, a path that does not load, or
            checkpoints of which none does; on all ranks.
    """
    given = resume not in ("auto", "never")
    candidates: list[Any] = [[Path(resume)] if given else published(folder)]
    dist.broadcast_object_list(candidates)  # the main rank's: all must try the same
    if resume == "never" and candidates[0]:
        raise _unusable(folder, resume, "it has some")
    for path in candidates[0]:
        checkpoint, mistake = _verify_together(path)
        if mistake is None:
            return checkpoint
        if given:
            raise CheckpointError(mistake)
        if dist.get_rank() == 0:
            print(f"{mistake}; trying the one before", file=sys.stderr)
    if candidates[0]:
        raise _unusable(folder, resume, "none of the checkpoints there can be used")
    return None


def _unusable(folder: Path, resume: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"--resume {resume}: {folder}: {why}; remove that folder or choose another --run"
    )


def _verify_together(path: Path) -> tuple[Checkpoint | None, str | None]:
    """Opens a checkpoint on every rank; each checks its share of the parts.

    Returns:
        The checkpoint, and the first mistake that any rank has found.
    """
    checkpoint, mistake = None, None
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.verify(sorted(checkpoint.parts)[dist.get_rank() :: dist.get_world_size()])
    except CheckpointError as error:
        mistake = str(error)
    mistakes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(mistakes, mistake)
    return checkpoint, next(filter(None, mistakes), None)


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The hash that a manifest holds of all the rest of it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
