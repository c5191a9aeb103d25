"""The guard against NaN and Inf: who began it, in which pictures, and when to give up.

A step whose gradients are no numbers never reaches the weights: DeepSpeed skips it at stages 1 to
3, `stage0` at stage 0, on all ranks alike since the norm is the global one. The guard then runs the
step's micro-batches again with eyes open and says which module was the first to give a number that
is none. Under fp16 most such steps only say that the loss scale was too large; those pass in
silence.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.assign import Targets
from ..model.detector import Criterion

SHOWN_IDS = 16


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
        if self.in_a_row >= self.limit:
            raise TrainingError(
                f"step {step}: {self.in_a_row} steps in a row gave gradients that are no numbers; "
                "lower optimizer.lr, or take the pictures that were named out of the data, and "
                "start again: the newest checkpoint is from before"
            )
        if self.in_a_row != 1:
            return None
        mine = [(self._find(batch), batch.image_ids) for batch in again]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [entry for entry in mine if entry[0]])
        found = [(rank, *entry) for rank, own in enumerate(everyone) for entry in own]
        if not found:
            return f"step {step} is skipped: its gradients are no numbers, but were when repeated"
        rank, where, ids = found[0]
        shown = ", ".join(map(str, ids[:SHOWN_IDS])) + (", …" if len(ids) > SHOWN_IDS else "")
        return (
            f"step {step} is skipped: NaN or Inf, first in {where}, on rank {rank}, in the "
            f"micro-batch of the images {shown}"
            + (f" ({len(found)} micro-batches in all)" if len(found) > 1 else "")
        )

    def _find(self, batch: MicroBatch) -> str | None:
        """The first place without numbers, when a micro-batch is computed again."""
        model: nn.Module = self.engine.module
        outputs: list[tuple[str, Tensor]] = []
        handles = [
            module.register_forward_hook(_record(name or "the model", outputs))
            for name, module in model.named_modules()
        ]
        # At stage 3 a backward pass would move shards about.
        backward = self.engine.zero_optimization_stage() < 3
        autocast = torch.autocast(
            batch.images.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        torch.manual_seed(batch.seed)
        try:
            with torch.set_grad_enabled(backward), autocast:
                raw = model(batch.images)
        finally:
            for handle in handles:
                handle.remove()
        for name, output in outputs:
            if not output.isfinite().all():
                return f"the output of {name}"
        losses = self.criterion(model.head, raw.levels, batch.targets)
        for name, loss in losses.items():
            if not loss.isfinite():
                return f"the {name} loss"
        return _in_gradients(sum(losses.values()), outputs) if backward else None


def _record(name: str, outputs: list[tuple[str, Tensor]]) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        # What hands on a tensor as it is, such as an identity, has not made it.
        if isinstance(output, Tensor) and all(output is not made for _, made in outputs):
            outputs.append((name, output))

    return hook


def _in_gradients(loss: Any, recorded: Sequence[tuple[str, Tensor]]) -> str | None:
    """The module, nearest to the loss, that gets a gradient of numbers and hands on none."""
    named = [(name, output) for name, output in recorded if output.requires_grad]
    outputs = [output for _, output in named]
    gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, outputs, allow_unused=True)
    last = "the losses"
    for (name, _), gradient in zip(reversed(named), reversed(gradients), strict=True):
        if gradient is None:
            continue
        if not gradient.isfinite().all():
            return f"the backward pass of {last}"
        last = name
    return None
