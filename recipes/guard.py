"""The guard against NaN and Inf: who began it, in which pictures, and when to give up.

A step whose gradients are no numbers never reaches the weights: DeepSpeed skips it at stages 1 to
3, `stage0` at stage 0, on all ranks alike since the norm is the global one. The guard then runs the
step's micro-batches again with eyes open and says which module was the first to give a number that
is none. Under fp16 most such steps only say that the loss scale was too large; those pass in
silence.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.assign import Targets
from ..model.detector import Criterion

SHOWN_IDS = 16
NO_MEMORY = "nothing: there was no memory for it"


class TrainingError(Exception):
    """A run that can't go on. The text is one sentence."""

    exit_code = 1


@dataclass(frozen=True)
class MicroBatch:
    """What a forward pass was made of, so that it can be made again."""

    images: Tensor  # [B, 3, H, W], on the device
    targets: Targets  # on the device
    image_ids: tuple[int, ...]  # [B], as in the annotations
    seed: int


class Guard:
    """Follows the steps of a run.

    Args:
        engine: DeepSpeed's.
        criterion: of the run.
        precision: what autocast computes in, or "fp32".
        limit: skipped steps in a row that end the run.
    """

    def __init__(self, engine: Any, criterion: Criterion, precision: str, limit: int):
        self.engine, self.criterion, self.precision = engine, criterion, precision
        self.limit, self.in_a_row = limit, 0

    def check(self, step: int, applied: bool, again: Iterable[MicroBatch]) -> str | None:
        """Takes note of a step; all ranks call it.

        Args:
            step: its number, from 1.
            applied: whether it moved the weights, or was skipped for a reason that is known.
            again: the micro-batches of this rank; looked at only where they are needed.

        Returns:
            What to say of a step that was skipped, the first of several in a row.

        Raises:
            TrainingError: too many in a row.
        """
        self.in_a_row = 0 if applied else self.in_a_row + 1
        found = self._look(step, again) if self.in_a_row == 1 else None
        if self.in_a_row >= self.limit:
            raise TrainingError(
                f"step {step}: {self.in_a_row} steps in a row gave gradients that are no numbers; "
                "lower optimizer.lr, or look at the pictures that were named, and start again; "
                "these steps have moved no weights" + (f" ({found})" * bool(found))
            )
        return found

    def _look(self, step: int, again: Iterable[MicroBatch]) -> str:
        """Has every rank compute its micro-batches again, and says where the first one failed."""
        mine = [(self._find(batch), batch.image_ids) for batch in again]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [entry for entry in mine if entry[0]])
        found = [(rank, *entry) for rank, own in enumerate(everyone) for entry in own]
        seen = [entry for entry in found if entry[1] != NO_MEMORY]
        if not seen:
            why = "there was no memory to look where" if found else "but were when repeated"
            return f"step {step} is skipped: its gradients are no numbers, {why}"
        rank, where, ids = seen[0]
        shown = ", ".join(map(str, ids[:SHOWN_IDS])) + (", …" if len(ids) > SHOWN_IDS else "")
        return (
            f"step {step} is skipped: NaN or Inf, first in {where}, on rank {rank}, in the "
            f"micro-batch of the images {shown}"
            + (f" ({len(seen)} micro-batches in all)" if len(seen) > 1 else "")
        )

    def _find(self, batch: MicroBatch) -> str | None:
        """The first place without numbers, when a micro-batch is computed again."""
        torch.manual_seed(batch.seed)
        try:
            return self._repeat(batch)
        except torch.OutOfMemoryError:  # the other ranks wait for what we have found
            return NO_MEMORY

    def _repeat(self, batch: MicroBatch) -> str | None:
        model: nn.Module = self.engine.module
        # At stage 3 a backward pass would move shards about.
        backward = self.engine.zero_optimization_stage() < 3
        watch = _Watch()
        handles = [
            module.register_forward_hook(watch.hook(name or "the model"))
            for name, module in model.named_modules()
        ]
        autocast = torch.autocast(
            batch.images.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        try:
            with torch.set_grad_enabled(backward), autocast:
                raw = model(batch.images)
        finally:
            for handle in handles:
                handle.remove()
        if watch.output:
            return f"the output of {watch.output}"
        losses = self.criterion(model.head, raw.levels, batch.targets)
        for name, loss in losses.items():
            if not loss.isfinite():
                return f"the {name} loss"
        if backward and watch.first is not None:
            torch.autograd.grad(sum(losses.values()), watch.first, allow_unused=True)
        return watch.gradient and f"the backward pass of {watch.gradient}"


class _Watch:
    """Looks at what modules put out, and at the gradients of that; keeps one of it in memory.

    So a repetition takes no more than the step did, whose activations may not all be kept.
    """

    def __init__(self) -> None:
        self.output: str | None = None  # the first module whose output is no numbers
        self.first: Tensor | None = None  # the first output that has a gradient: as far it goes
        self.gradient: str | None = None  # the one nearest to the loss whose gradient is none
        self._passed = "the losses"  # got a gradient of numbers, nearest to the module at hand
        self._seen: list[weakref.ref[Tensor]] = []

    def hook(self, name: str) -> Any:
        """A forward hook for a module of that name."""

        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            # What hands on a tensor as it is, such as an identity, has not made it.
            if not isinstance(output, Tensor) or any(ref() is output for ref in self._seen):
                return
            self._seen.append(weakref.ref(output))
            if self.output is None and not output.detach().isfinite().all():
                self.output = name
            if output.requires_grad:
                self.first = output if self.first is None else self.first
                output.register_hook(lambda gradient: self._look_back(name, gradient))

        return look

    def _look_back(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None:
            if not gradient.isfinite().all():
                self.gradient = self._passed
            self._passed = name
