"""Streams over the shards of noise, and what identifies their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from convnext_yolo.data_prep.augment import Augmentation
from convnext_yolo.data_prep.batch import Batch
from convnext_yolo.data_prep.loader import training_batches
from convnext_yolo.data_prep.reader import ShardReader
from convnext_yolo.data_prep.stream import BatchPlan, TrainStream
from convnext_yolo.model.letterbox import fit

# Eight ranks with three workers each divide it.
SAMPLES, GLOBAL, MICRO, FRAME = 57, 24, 3, (64, 96)
STEPS = SAMPLES // GLOBAL  # fewer than a window holds
STRONG = Augmentation(0.7, 0.5, 0.1, 0.5, 0.5, 0.1, 0.7, 0.4)
WEAK = Augmentation(0.0, 0.2, 0.1, 0.5, 0.0, 0.0, 0.0, 0.0)


def strengths(step: int) -> Augmentation:
    return STRONG if step < 4 else WEAK


def stream_of(
    reader: ShardReader,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    seed: int = 7,
    on_device: bool = False,
) -> TrainStream:
    plan = BatchPlan(GLOBAL, MICRO, rank, world)
    return TrainStream(reader, plan, seed, start, FRAME, strengths, fit, on_device)


def global_batches(
    noise_shards: Path,
    world: int,
    workers: int,
    start: int,
    count: int,
    reader: type[ShardReader] = ShardReader,
    on_device: bool = False,
) -> list[list[Batch]]:
    """The micro-batches of `count` global batches in their order, made by `world` ranks."""
    steps: list[dict[int, Batch]] = [{} for _ in range(count)]
    for rank in range(world):
        stream = stream_of(reader(noise_shards), rank, world, start, on_device=on_device)
        batches = training_batches(stream, workers)
        for step in steps:
            for turn in range(stream.plan.accumulation):
                step[turn * world + rank] = next(batches)
    return [[step[number] for number in sorted(step)] for step in steps]


def sha256(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.images, batch.image_index, batch.labels, batch.boxes_xyxy):
            digest.update(repr((tensor.dtype, tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(repr(batch.image_ids).encode())
    return digest.hexdigest()
