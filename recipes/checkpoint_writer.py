"""Sharded checkpoints, written: in two phases, beside the training, and never half.

1. `begin`: every rank gathers the tensors, copies those of its parts to host memory and hands them
   to a thread, which writes, syncs and hashes them in a `.partial` folder. The loop goes on.
2. `finish`: when all ranks' threads are done (the loop's own reduction tells), the receipts are
   gathered, the main rank writes the manifest and renames the folder. Only then it exists.

Invariants:
1. Threads never communicate: every collective is the loop's, in the same order on all ranks.
2. What a rank could not write fails the checkpoint on every rank, with one sentence; the partial
   folder goes, the published ones stay, and training may go on.
3. Retention runs after a publication alone and spares what was just published, so one good
   checkpoint is always there.
Names and sizes alone decide which part a tensor is in, and ranks share the parts among them.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    file_sha256,
    manifest_sha256,
    open_checkpoint,
    published,
)

PART_BYTES = 64 * 2**20
LATEST, BEST = "latest", "best"  # files that hold the name of a checkpoint


@dataclass(frozen=True)
class Entry:
    """A tensor to be saved, and how to get it. `gather` is collective: every rank calls it."""

    name: str
    bytes: int
    gather: Callable[[], Tensor]


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    state: dict[str, Any]
    partial: Path
    receipts: dict[str, dict[str, Any]]  # of this rank's parts
    error: OSError | None = None


class CheckpointWriter:
    """Writes the checkpoints of a run. All ranks make the same calls in the same order.

    Args:
        folder: the run's `checkpoints`.
        keep: how many of the newest stay.
        keep_best: whether the one with the highest AP stays as well.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool):
        self.folder, self.keep, self.keep_best = folder, keep, keep_best
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
        write_more: Callable[[Path], None] | None = None,
    ) -> None:
        """Copies a checkpoint to host memory and starts writing it.

        Args:
            step: global steps done.
            entries: all tensors, in the same order on every rank.
            state: what else belongs to it; JSON. "metrics" and "evaluated_step" decide the best.
            write_more: writes further files into the folder, now and collectively.

        Raises:
            CheckpointError: the one before, still pending, could not be published.
        """
        if self.is_pending:
            self.finish()
        partial = self.folder / f"step-{step:08d}.partial"
        pending = _Pending(step, state, partial, {})
        if dist.get_rank() == 0:
            try:
                for left in self.folder.glob("*.partial"):  # by a run that was killed
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                partial.mkdir(parents=True)
            except OSError as error:
                pending.error = error
        # Also the barrier: nobody writes into a folder that is not there yet.
        is_made = [pending.error is None]
        dist.broadcast_object_list(is_made)
        if write_more and is_made[0]:
            write_more(partial)
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

    def _copy(self, entries: Sequence[Entry]) -> dict[str, dict[str, Tensor]]:
        """This rank's parts in host memory, by file name. Gathers all tensors on all ranks."""
        rank, world = dist.get_rank(), dist.get_world_size()
        mine: dict[str, dict[str, Tensor]] = {}
        for number, part in enumerate(_parts(entries)):
            for entry in part:
                tensor = entry.gather().detach()
                if number % world == rank:
                    name = f"part-{number:05d}.safetensors"
                    mine.setdefault(name, {})[entry.name] = self._host_copy(entry.name, tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies do not wait for each other
        return mine

    def _host_copy(self, name: str, tensor: Tensor) -> Tensor:
        held = self._host.get(name)
        if held is None or held.shape != tensor.shape:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[name] = held
        return held.copy_(tensor, non_blocking=True)

    def _publish(self, pending: _Pending, parts: dict[str, dict[str, Any]]) -> None:
        for file in pending.partial.rglob("*"):  # what write_more has left
            name = str(file.relative_to(pending.partial))
            if file.is_file() and name not in parts:
                parts[name] = {"sha256": file_sha256(file), "bytes": file.stat().st_size}
        for name, part in parts.items():
            size = (pending.partial / name).stat().st_size
            if size != part["bytes"]:
                raise OSError(f"{name} has {size} bytes here and {part['bytes']} where written")
        manifest = {"format": FORMAT, "step": pending.step, "state": pending.state, "parts": parts}
        manifest["sha256"] = manifest_sha256(manifest)
        text = json.dumps(manifest, indent=1, sort_keys=True)
        _write_synced(pending.partial / MANIFEST, text)
        sync_folder(pending.partial)
        final = pending.partial.with_suffix("")
        # Of this step there is one already where the run came back to it: damaged, or without its
        # evaluation. Two renames: a kill between them leaves it under the other name.
        before = _set_aside(final) if final.exists() else None
        pending.partial.rename(final)
        self._point(LATEST, final.name)
        if before:
            shutil.rmtree(before)
        self._retire(final)

    def _point(self, pointer: str, name: str) -> None:
        partial = self.folder / f"{pointer}.partial"
        _write_synced(partial, name)
        partial.replace(self.folder / pointer)
        sync_folder(self.folder)

    def _retire(self, final: Path) -> None:
        """Keeps the last few up to `final`, which was just published, and the best.

        Newer ones are of a branch that the run has left: damaged, or older than a `--resume PATH`.
        They would win the next `--resume auto`, so they are set aside.
        """
        for path in published(self.folder):
            if path.name > final.name:
                aside = _set_aside(path)
                print(f"{path.name} is not of this run's past: now {aside}", file=sys.stderr)
        present = published(self.folder)
        spared = set(present[: self.keep])
        if self.keep_best and (best := best_of(present)):
            self._point(BEST, best.name)
            spared.add(best)
        for old in present:
            if old not in spared:
                # Renamed first: a kill in the middle leaves no half of one under its name.
                shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))


def best_of(paths: Sequence[Path]) -> Path | None:
    """The checkpoint whose own evaluation gave the highest AP; of equals the newest."""
    scores = []
    for path in paths:
        try:
            found = open_checkpoint(path)
        except CheckpointError:
            continue
        if found.state.get("evaluated_step") == found.step:
            scores.append((found.state["metrics"]["AP"], found.step, path))
    return max(scores)[2] if scores else None


def _set_aside(path: Path) -> Path:
    aside = path.with_name("set-aside-" + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


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


def _write(pending: _Pending, parts: dict[str, dict[str, Tensor]]) -> None:
    """The thread: writes this rank's parts; what goes wrong is kept for `finish`."""
    try:
        for name, tensors in parts.items():
            if pending.error is None:
                pending.receipts[name] = _write_part(pending.partial / name, tensors)
    except Exception as error:  # a thread has nobody else to tell, and safetensors its own kinds
        pending.error = error if isinstance(error, OSError) else OSError(str(error))


def _write_part(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes renames in a folder last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_bytes(tensor: Any) -> int:
    """Bytes of a tensor when whole; ZeRO-3 leaves an empty one and the true size beside it."""
    size = getattr(tensor, "ds_numel", None) or tensor.numel()
    return int(size) * torch.empty(0, dtype=tensor.dtype).element_size()
