"""From the stream's parts, made by worker processes or here, to micro-batches."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, Part, join
from .device import DeviceComposer
from .ring import PREFETCH, FrameRing
from .stream import TrainStream
from .workers import load

CPU = torch.device("cpu")


def training_batches(
    stream: TrainStream, workers: int, device: torch.device = CPU
) -> Iterator[Batch]:
    """Iterates whole micro-batches of this rank, made by `workers` processes (0: by this one).

    Args:
        stream: of this rank.
        workers: processes; more than a micro-batch has slots are not started.
        device: where samples are composed, if the stream leaves that to it.
    """
    composer = DeviceComposer(stream, device) if stream.on_device else None
    for parts, pixels in parts_of_batches(stream, workers):
        yield composer.compose(parts, pixels) if composer else join(parts, pixels)


def parts_of_batches(
    stream: TrainStream, workers: int
) -> Iterator[tuple[list[Part], list[Tensor]]]:
    """The parts of each micro-batch and their pixels, which last until the next is asked for."""
    workers = min(workers, stream.plan.micro_batch)
    options: dict[str, Any] = {"batch_size": None}
    if workers:
        largest_part = -(-stream.plan.micro_batch // workers)
        stream.ring = FrameRing(workers, largest_part, stream.frame_px)
        options["prefetch_factor"] = PREFETCH
    made = load(stream, workers, **options)
    while True:
        # The loader takes one part from each worker in turn, so `workers` parts are one batch.
        parts: list[Part] = [next(made) for _ in range(max(1, workers))]
        yield parts, [_pixels_of(part, i, stream.ring) for i, part in enumerate(parts)]


def _pixels_of(part: Part, worker: int, ring: FrameRing | None) -> Tensor:
    if part.pixels is not None:
        return torch.from_numpy(part.pixels)
    assert ring is not None
    return ring.take(worker, len(part.image_ids))
