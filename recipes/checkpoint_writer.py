"""Sharded checkpoints, written: in two phases, beside the training, and never half.

1. `begin`: every rank copies its share of the tensors to host memory and hands it to a thread,
   which writes, syncs and hashes it in a `.partial` folder. The loop goes on.
2. `finish`: when all ranks' threads are done (the loop's own reduction tells), the receipts are
   gathered, the main rank writes the manifest and renames the folder. Only then it exists.

Invariants:
1. Threads never communicate: every collective is the loop's, in the same order on all ranks.
2. What a rank could not write fails the checkpoint on every rank, with one sentence; the partial
   folder goes, the published ones stay, and training may go on.
3. Retention (`retention`) runs after a publication alone, so one good checkpoint is always there.
4. Nothing is gathered: of a tensor that ZeRO has split, each rank writes the piece that it holds.
Names and sizes alone decide which part a whole tensor is in, and ranks share those parts among
them; pieces go into parts of each rank's own.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import (
    FORMAT,
    MANIFEST,
    SPLIT,
    CheckpointError,
    file_sha256,
    manifest_sha256,
)
from .files import sync_folder, write_synced
from .retention import Retention

PART_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Entry:
    """A tensor to be saved that every rank holds, or a piece of one that this rank alone holds."""

    name: str
    bytes: int
    get: Callable[[], Tensor]  # no collective
    start: int | None = None  # of a piece: where it begins in the whole, as a flat tensor
    shape: tuple[int, ...] = ()  # of a piece: the whole's

    @property
    def key(self) -> str:
        """Its name in a part."""
        return self.name if self.start is None else f"{self.name}@{self.start}"


@dataclass(frozen=True)
class _Part:
    """What goes into a file."""

    tensors: dict[str, Tensor]
    split: dict[str, tuple[int, ...]]  # whole shapes of the tensors of which it has pieces


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    state: dict[str, Any]
    partial: Path
    more: Sequence[Path] = ()  # files that this rank has written besides
    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)  # of all its files
    error: OSError | None = None


class CheckpointWriter:
    """Writes the checkpoints of a run. All ranks make the same calls in the same order.

    Args:
        folder: the run's `checkpoints`.
        keep: how many of the newest stay.
        keep_best: whether the one with the highest AP stays as well.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool):
        self.folder, self.retention = folder, Retention(folder, keep, keep_best)
        self._pending: _Pending | None = None
        self._thread: threading.Thread | None = None
        self._host: dict[str, Tensor] = {}  # host memory, used again by every checkpoint

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint has begun and is not published."""
        return self._pending is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank's parts of the pending checkpoint are on disk, or have failed."""
        return self._thread is not None and not self._thread.is_alive()

    def begin(
        self,
        step: int,
        entries: Sequence[Entry],
        state: dict[str, Any],
        write_more: Callable[[Path], Sequence[Path]] | None = None,
    ) -> None:
        """Copies a checkpoint to host memory and starts writing it.

        Args:
            step: global steps done.
            entries: all tensors; whole ones in the same order on every rank.
            state: what else belongs to it; JSON. "metrics" and "evaluated_step" decide the best.
            write_more: writes further files into the folder, now and collectively; returns those
                of this rank, and raises OSError when all ranks are past its collectives.

        Raises:
            CheckpointError: the one before, still pending, could not be published.
        """
        if self.is_pending:
            self.finish()
        partial = self.folder / f"step-{step:08d}.partial"
        pending = _Pending(step, state, partial)
        if dist.get_rank() == 0:
            try:
                self.retention.clean()
                self._make(partial)
            except OSError as error:
                pending.error = error
        # Also the barrier: nobody writes into a folder that is not there yet.
        is_made = [pending.error is None]
        dist.broadcast_object_list(is_made)
        if write_more and is_made[0]:
            try:
                pending.more = write_more(partial)
            except OSError as error:
                pending.error = error
        parts = self._copy(entries)
        self._pending = pending
        self._thread = threading.Thread(target=_write, args=(pending, parts), daemon=True)
        self._thread.start()

    def finish(self) -> Path:
        """Waits for the pending checkpoint and publishes it.

        Raises:
            CheckpointError: on every rank, where any could not write.
        """
        assert self._pending is not None and self._thread is not None
        self._thread.join()
        pending, self._pending, self._thread = self._pending, None, None
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, pending.error or pending.receipts)
        failure: list[Any] = [next((o for o in outcomes if isinstance(o, OSError)), None)]
        if dist.get_rank() == 0:
            try:
                if failure[0] is None:
                    self._publish(pending, {k: v for own in outcomes for k, v in own.items()})
            except OSError as error:
                failure[0] = error
            if failure[0] is not None:
                shutil.rmtree(pending.partial, ignore_errors=True)
        dist.broadcast_object_list(failure)
        if failure[0] is not None:
            why = failure[0].strerror or failure[0]
            raise CheckpointError(
                f"checkpoint of step {pending.step}: can't be written to {self.folder} ({why}); "
                "the ones before it stay as they are"
            )
        return pending.partial.with_suffix("")

    def _make(self, partial: Path) -> None:
        """The folders, each known to the one above it."""
        new = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        partial.mkdir(parents=True)
        for folder in new:
            sync_folder(folder.parent)

    def _copy(self, entries: Sequence[Entry]) -> dict[str, _Part]:
        """This rank's parts in host memory, by file name."""
        rank, world = dist.get_rank(), dist.get_world_size()
        whole = list(enumerate(_parts([e for e in entries if e.start is None])))
        files = {f"part-{number:05d}": part for number, part in whole[rank::world]}
        pieces = enumerate(_parts([e for e in entries if e.start is not None]))
        files |= {f"part-of-rank-{rank:05d}-{number:05d}": part for number, part in pieces}
        mine = {
            f"{name}.safetensors": _Part(
                self._host_copies({e.key: e.get().detach() for e in part}),
                {e.name: e.shape for e in part if e.start is not None},
            )
            for name, part in files.items()
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies do not wait for each other
        return mine

    def _host_copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            if name not in self._host:
                memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._host[name] = memory
        held = {name: self._host[name] for name in tensors}
        torch._foreach_copy_(list(held.values()), list(tensors.values()), non_blocking=True)
        return held

    def _publish(self, pending: _Pending, parts: dict[str, dict[str, Any]]) -> None:
        for path in pending.partial.rglob("*"):  # small ones, which write_more has not named
            name = str(path.relative_to(pending.partial))
            if path.is_dir():
                sync_folder(path)
            elif name not in parts:
                parts[name] = _receipt(path)
        for name, part in parts.items():
            size = (pending.partial / name).stat().st_size
            if size != part["bytes"]:
                raise OSError(f"{name} has {size} bytes here and {part['bytes']} where written")
        manifest = {"format": FORMAT, "step": pending.step, "state": pending.state, "parts": parts}
        manifest["sha256"] = manifest_sha256(manifest)
        text = json.dumps(manifest, indent=1, sort_keys=True)
        write_synced(pending.partial / MANIFEST, text)
        sync_folder(pending.partial)
        self.retention.publish(pending.partial)


def _parts(entries: Sequence[Entry]) -> list[list[Entry]]:
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


def _write(pending: _Pending, parts: dict[str, _Part]) -> None:
    """The thread: writes this rank's parts; what goes wrong is kept for `finish`."""
    try:
        for name, part in parts.items():
            if pending.error is None:
                pending.receipts[name] = _write_part(pending.partial / name, part)
        for path in pending.more:
            pending.receipts[str(path.relative_to(pending.partial))] = _receipt(path)
    except Exception as error:  # a thread has nobody else to tell, and safetensors its own kinds
        pending.error = error if isinstance(error, OSError) else OSError(str(error))


def _write_part(path: Path, part: _Part) -> dict[str, Any]:
    save_file(part.tensors, path, {SPLIT: json.dumps(part.split)} if part.split else None)
    return _receipt(path)


def _receipt(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, once that is safe on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}
