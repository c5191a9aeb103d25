from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.loader import training_batches
from convnext_yolo.data_prep.order import WINDOW, EpochOrder
from convnext_yolo.data_prep.reader import Sample, ShardReader
from convnext_yolo.data_prep.stream import BatchPlan, Lane, TrainStream
from convnext_yolo.model.letterbox import fit

from .streams import (
    FRAME,
    GLOBAL,
    MICRO,
    SAMPLES,
    STEPS,
    global_batches,
    sha256,
    stream_of,
    strengths,
)

process = pytest.mark.process
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on few cores


@pytest.fixture(scope="module")
def expected(noise_shards: Path) -> list[str]:
    """Two epochs and two steps, made by one process."""
    return [sha256(step) for step in global_batches(noise_shards, 1, 0, 0, 2 * STEPS + 2)]


def test_batches_differ_from_each_other(expected):
    assert len(set(expected)) == 2 * STEPS + 2


@process
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_world_size_and_workers_do_not_change_the_batches(noise_shards, expected, world, workers):
    steps = global_batches(noise_shards, world, workers, 0, 2 * STEPS)
    assert [sha256(step) for step in steps] == expected[: 2 * STEPS]


@process
@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    start=st.integers(1, 2 * STEPS),
    world=st.sampled_from([1, 2, 4, 8]),
    workers=st.sampled_from([0, 1, 3]),
)
def test_a_resume_at_any_step_goes_on_as_if_nothing_had_happened(
    noise_shards, expected, start, world, workers
):
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
    first, second = (next(training_batches(stream, 0)) for stream in (one, two))
    assert first.image_ids != second.image_ids
    assert sha256([first]) != sha256([second])


def test_a_lane_decodes_each_picture_once_and_older_ones_when_they_are_taken():
    order = EpochOrder(40, 4, 0)
    decoded: list[int] = []

    def decode(position: int) -> Any:
        decoded.append(position)
        return position

    lane = Lane(2, order, decode)
    assert lane.at(5) == order.lane(2, 5)
    assert lane.at(5 - WINDOW) == order.lane(2, 5 - WINDOW)
    assert len(decoded) == 2
    for step in range(6, 30):
        lane.forget_before(step)
        for before in range(WINDOW + 1):
            if step - before >= 5:
                assert lane.at(step - before) == order.lane(2, step - before)
        assert len(lane.window) <= WINDOW + 1
    assert decoded[2:] == [order.lane(2, step) for step in range(6, 30)]


def test_every_sample_has_a_key_of_its_own(noise_shards, monkeypatch):
    stream = stream_of(ShardReader(noise_shards))
    keys = []
    generator = np.random.default_rng

    def note(seed: tuple[int, ...]) -> np.random.Generator:
        keys.append(seed)
        return generator(seed)

    lanes = [Lane(lane, stream.order, stream.decode) for lane in range(GLOBAL)]
    monkeypatch.setattr(np.random, "default_rng", note)
    for step in range(2 * STEPS):
        for lane in lanes:
            stream.make(lane.lane, step, lane.at)
    keys = [key for key in keys if len(key) == 3]  # the others deal epochs
    epochs = [(7, epoch, i) for epoch in range(2) for i in range(STEPS * GLOBAL)]
    assert keys == epochs


class Counting(ShardReader):
    decoded = 0

    def decode(self, position: int, out: np.ndarray | None = None) -> Sample:
        self.decoded += 1
        return super().decode(position, out)


def test_an_image_is_decoded_about_once_an_epoch(noise_shards):
    reader = Counting(noise_shards)
    plan = BatchPlan(1, 1, 0, 1)
    stream = TrainStream(reader, plan, 0, 0, FRAME, strengths, fit)
    batches = iter(stream)
    for _ in range(SAMPLES):
        next(batches)
    assert SAMPLES <= reader.decoded <= SAMPLES + WINDOW <= 1.2 * SAMPLES
    before = reader.decoded
    for _ in range(SAMPLES):
        next(batches)
    assert reader.decoded == before + SAMPLES  # windows are filled once a run


def test_too_few_samples_for_a_batch(noise_shards):
    plan = BatchPlan(64, 4, 0, 1)
    with pytest.raises(DataError) as error:
        TrainStream(ShardReader(noise_shards), plan, 0, 0, FRAME, strengths, fit)
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

    def decode(self, position: int, out: np.ndarray | None = None) -> Sample:
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
    stream = TrainStream(reader, plan, 0, 0, FRAME, strengths, fit)  # type: ignore[arg-type]
    kept = stream.decode(0)
    picture = kept.picture
    assert kept.image_id == 42
    assert picture.labels.tolist() == [1]  # a crowd is no target
    scale = min(1, FRAME[0] / height, FRAME[1] / width)  # smaller ones stay as they are
    assert picture.image.shape[:2] == tuple(max(1, round(side * scale)) for side in size)
    np.testing.assert_allclose(picture.boxes_xyxy[0], np.array([x1, y1, x2, y2]) * scale, atol=1e-3)
    rows, columns = (picture.image[..., 0] >= 128).nonzero()
    if min(x2 - x1, y2 - y1) * scale > 2:  # less can vanish between pixels
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(found, picture.boxes_xyxy[0], atol=1.5)
