from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.augment import Augmentation
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.reader import Sample, ShardReader
from convnext_yolo.data_prep.stream import (
    WINDOW,
    Batch,
    BatchPlan,
    EpochOrder,
    Lane,
    TrainStream,
    training_batches,
)
from convnext_yolo.model.letterbox import letterbox

process = pytest.mark.process
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on few cores

SAMPLES, GLOBAL, MICRO, FRAME = 57, 16, 4, (64, 96)
STEPS = SAMPLES // GLOBAL  # fewer than a window holds
STRONG = Augmentation(0.7, 0.5, 0.1, 0.5, 0.5, 0.1, 0.7, 0.4)
WEAK = Augmentation(0.0, 0.2, 0.1, 0.5, 0.0, 0.0, 0.0, 0.0)


def strengths(step: int) -> Augmentation:
    return STRONG if step < 4 else WEAK


def stream_of(
    reader: ShardReader, rank: int = 0, world: int = 1, start: int = 0, seed: int = 7
) -> TrainStream:
    plan = BatchPlan(GLOBAL, MICRO, rank, world)
    return TrainStream(reader, plan, seed, start, FRAME, strengths, letterbox)


def global_batches(
    noise_shards: Path, world: int, workers: int, start: int, count: int
) -> list[list[Batch]]:
    """The micro-batches of `count` global batches in their order, made by `world` ranks."""
    steps: list[dict[int, Batch]] = [{} for _ in range(count)]
    for rank in range(world):
        stream = stream_of(ShardReader(noise_shards), rank, world, start)
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


@pytest.fixture(scope="module")
def expected(noise_shards: Path) -> list[str]:
    """Two epochs and two steps, made by one process."""
    return [sha256(step) for step in global_batches(noise_shards, 1, 0, 0, 2 * STEPS + 2)]


def test_batches_differ_from_each_other(expected):
    assert len(set(expected)) == 2 * STEPS + 2


@pytest.mark.parametrize("world", [2, 4])
def test_world_size_does_not_change_the_batches(noise_shards, expected, world):
    steps = global_batches(noise_shards, world, 0, 0, 2 * STEPS + 2)
    assert [sha256(step) for step in steps] == expected


@process
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_do_not_change_the_batches(noise_shards, expected, world, workers):
    steps = global_batches(noise_shards, world, workers, 0, 2 * STEPS)
    assert [sha256(step) for step in steps] == expected[: 2 * STEPS]


@pytest.mark.parametrize("start", range(1, 2 * STEPS + 1))
def test_a_resume_at_any_step_goes_on_as_if_nothing_had_happened(noise_shards, expected, start):
    world = (1, 2, 4)[start % 3]
    steps = global_batches(noise_shards, world, 0, start, 2)
    assert [sha256(step) for step in steps] == expected[start : start + 2]


@process
@pytest.mark.parametrize(("world", "workers", "start"), [(1, 3, 2), (2, 1, STEPS), (4, 3, 4)])
def test_a_resume_with_workers(noise_shards, expected, world, workers, start):
    steps = global_batches(noise_shards, world, workers, start, 2)
    assert [sha256(step) for step in steps] == expected[start : start + 2]


def test_what_a_batch_holds(noise_shards):
    reader = ShardReader(noise_shards)
    stream = stream_of(reader)
    ids = []
    for step, micro_batches in enumerate(global_batches(noise_shards, 1, 0, 0, STEPS)):
        for batch in micro_batches:
            assert batch.images.shape == (MICRO, *FRAME, 3)
            assert batch.images.dtype == torch.uint8
            assert batch.image_index.dtype == batch.labels.dtype == torch.int64
            assert batch.boxes_xyxy.dtype == torch.float32
            count = len(batch.labels)
            assert batch.image_index.shape == (count,)
            assert batch.boxes_xyxy.shape == (count, 4)
            assert batch.image_index.tolist() == sorted(batch.image_index.tolist())
            assert ((batch.image_index >= 0) & (batch.image_index < MICRO)).all()
        lanes = [i for batch in micro_batches for i in batch.image_ids]
        assert lanes == [3 * stream.order.lane(j, step) for j in range(GLOBAL)]
        ids += lanes
    assert max(Counter(ids).values()) == 1  # the primary image of one sample an epoch
    assert len(ids) == STEPS * GLOBAL > SAMPLES - GLOBAL


def test_another_seed_gives_other_batches(noise_shards):
    one, two = (stream_of(ShardReader(noise_shards), seed=seed) for seed in (7, 8))
    first, second = next(iter(one)), next(iter(two))
    assert first.image_ids != second.image_ids
    assert sha256([first]) != sha256([second])


def test_partners_are_the_pictures_of_the_steps_before():
    order = EpochOrder(40, 4, 0)
    pictures: dict[int, Any] = {i: object() for i in range(40)}
    lane = Lane(2, order, lambda position: (pictures[position], 100 + position))
    for step in range(-3, 25):
        primary, image_id, partners = lane.at(step)
        assert primary is pictures[order.lane(2, step)]
        assert image_id == 100 + order.lane(2, step)
        before = [pictures[order.lane(2, s)] for s in range(step - WINDOW, step)]
        assert len(partners) == WINDOW
        assert all(a is b for a, b in zip(partners, before, strict=True))


def test_every_sample_has_a_key_of_its_own(noise_shards, monkeypatch):
    stream = stream_of(ShardReader(noise_shards))
    keys = []
    generator = np.random.default_rng

    def note(seed: tuple[int, ...]) -> np.random.Generator:
        keys.append(seed)
        return generator(seed)

    lanes = [Lane(lane, stream.order, stream._decode) for lane in range(GLOBAL)]
    monkeypatch.setattr(np.random, "default_rng", note)
    for step in range(2 * STEPS):
        for lane in lanes:
            stream._sample(lane, step)
    keys = [key for key in keys if len(key) == 3]  # the others deal epochs
    epochs = [(7, epoch, i) for epoch in range(2) for i in range(STEPS * GLOBAL)]
    assert keys == epochs


class Counting(ShardReader):
    decoded = 0

    def decode(self, position: int) -> Sample:
        self.decoded += 1
        return super().decode(position)


def test_an_image_is_decoded_about_once_an_epoch(noise_shards):
    reader = Counting(noise_shards)
    plan = BatchPlan(1, 1, 0, 1)
    stream = TrainStream(reader, plan, 0, 0, FRAME, strengths, letterbox)
    batches = iter(stream)
    for _ in range(SAMPLES):
        next(batches)
    assert reader.decoded == SAMPLES + WINDOW <= 1.2 * SAMPLES
    for _ in range(SAMPLES):
        next(batches)
    assert reader.decoded == 2 * SAMPLES + WINDOW  # windows are filled once a run


def test_too_few_samples_for_a_batch(noise_shards):
    plan = BatchPlan(64, 4, 0, 1)
    with pytest.raises(DataError) as error:
        TrainStream(ShardReader(noise_shards), plan, 0, 0, FRAME, strengths, letterbox)
    assert str(error.value) == (
        "batch.global is 64, but the training shards hold 57 samples; "
        "take a global batch of at most that"
    )


class Painted:
    """A reader of one picture, red on black, with the red one's box and a crowd's."""

    def __init__(self, height: int, width: int, box: tuple[int, int, int, int]):
        image = np.zeros((height, width, 3), np.uint8)
        image[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
        boxes = np.array([[0, 0, width, height], box], np.float32)
        crowd = np.array([True, False])
        self.sample = Sample(image, boxes, np.array([0, 1]), crowd, np.ones(2, np.float32), 42)

    def __len__(self) -> int:
        return 1

    def decode(self, position: int) -> Sample:
        return self.sample


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_boxes_follow_pixels_into_the_frame(size, corners):
    height, width = size
    x1, x2 = sorted(round(corner * width) for corner in corners[:2])
    y1, y2 = sorted(round(corner * height) for corner in corners[2:])
    reader = Painted(height, width, (x1, y1, x2, y2))
    plan = BatchPlan(1, 1, 0, 1)
    stream = TrainStream(reader, plan, 0, 0, FRAME, strengths, letterbox)  # type: ignore[arg-type]
    picture, image_id = stream._decode(0)
    assert image_id == 42
    assert picture.labels.tolist() == [1]  # a crowd is no target
    scale = min(FRAME[0] / height, FRAME[1] / width)
    assert picture.image.shape[:2] == tuple(max(1, round(side * scale)) for side in size)
    np.testing.assert_allclose(picture.boxes_xyxy[0], np.array([x1, y1, x2, y2]) * scale, atol=1e-3)
    rows, columns = (picture.image[..., 0] >= 128).nonzero()
    if min(x2 - x1, y2 - y1) * scale > 2:  # less can vanish between pixels
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(found, picture.boxes_xyxy[0], atol=1.5)
