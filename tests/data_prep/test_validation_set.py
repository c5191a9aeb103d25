from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.batch import Batch
from convnext_yolo.data_prep.reader import FileReader, Sample, ShardReader
from convnext_yolo.data_prep.validation import (
    RectangularSet,
    ValidationSet,
    rectangular_batches,
    validation_batches,
)
from convnext_yolo.model.letterbox import letterbox

FRAME = (64, 96)


class First:
    """The first pictures of a reader."""

    def __init__(self, reader: ShardReader, count: int):
        self.reader, self.count, self.classes = reader, count, reader.classes

    def __len__(self) -> int:
        return self.count

    def decode(self, position: int) -> Sample:
        assert 0 <= position < self.count
        return self.reader.decode(position)


def parts(reader: First, world: int, workers: int, batch: int = 4) -> list[list[Batch]]:
    """The batches of each rank."""
    sets = [ValidationSet(reader, FRAME, letterbox, rank, world) for rank in range(world)]
    return [list(validation_batches(data, batch, workers)) for data in sets]


def ids(batches: Sequence[Batch]) -> list[int]:
    return [image_id for batch in batches for image_id in batch.image_ids]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(samples=st.integers(1, 300), world=st.integers(1, 40))
def test_every_picture_belongs_to_one_rank(samples, world):
    reader = First.__new__(First)
    reader.count = samples
    sets = [ValidationSet(reader, FRAME, letterbox, rank, world) for rank in range(world)]
    positions = [int(i) for data in sets for i in data.positions]
    assert positions == list(range(samples))
    sizes = [len(data) for data in sets]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)  # the main rank has one, if there are any


@pytest.mark.parametrize(
    ("samples", "world", "workers"),
    [
        (57, 1, 0),
        (57, 2, 0),
        (7, 3, 0),
        (2, 4, 0),  # ranks without a picture
        pytest.param(57, 2, 3, marks=pytest.mark.process),
        pytest.param(2, 3, 1, marks=pytest.mark.process),
    ],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_every_picture_exactly_once_over_the_ranks(noise_shards, samples, world, workers):
    found = parts(First(ShardReader(noise_shards), samples), world, workers)
    assert [i for batches in found for i in ids(batches)] == list(range(0, 3 * samples, 3))
    for batches in found:
        assert all(len(batch.image_ids) == 4 for batch in batches[:-1])
    assert [bool(batches) for batches in found] == [rank < samples for rank in range(world)]


@pytest.mark.process
def test_workers_do_not_change_the_batches(noise_shards):
    reader = First(ShardReader(noise_shards), 11)
    ((*one,), (*two,)) = parts(reader, 1, 0)[0], parts(reader, 1, 2)[0]
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.boxes_xyxy, b.boxes_xyxy)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.image_index, b.image_index)
        assert (a.frames, a.image_ids) == (b.frames, b.image_ids)


def test_what_a_batch_holds(noise_shards):
    reader = ShardReader(noise_shards)
    (batch,) = validation_batches(ValidationSet(reader, FRAME, letterbox), len(reader), 0)
    assert batch.images.shape == (57, *FRAME, 3)
    assert len(batch.frames) == len(batch.truth) == 57
    seen_crowds = 0
    for i, (frame, truth) in enumerate(zip(batch.frames, batch.truth, strict=True)):
        sample = reader.decode(i)
        height, width = sample.image.shape[:2]
        assert (truth.image_id, truth.width_px, truth.height_px) == (3 * i, width, height)
        for field in ("boxes_xyxy", "labels", "crowd", "area"):  # as annotated, crowds included
            np.testing.assert_array_equal(getattr(truth, field), getattr(sample, field))
        seen_crowds += truth.crowd.sum()
        np.testing.assert_array_equal(batch.images[i], letterbox(sample.image, *FRAME)[0])

        mine = batch.image_index == i
        targets = ~truth.crowd  # a crowd is no target for the losses
        assert batch.labels[mine].tolist() == truth.labels[targets].tolist()
        back = frame.to_picture(batch.boxes_xyxy[mine]).numpy()
        np.testing.assert_allclose(back, truth.boxes_xyxy[targets], atol=1e-3)
    assert seen_crowds > 5


def test_files_serve_as_well_as_shards(coco_files, tmp_path):
    coco_files.shard(tmp_path / "shards")
    readers = (FileReader(coco_files.read()), ShardReader(tmp_path / "shards"))
    one, two = (next(validation_batches(ValidationSet(r, FRAME, letterbox), 5, 0)) for r in readers)
    assert one.image_ids == two.image_ids == (0, 12, 31, 70, 500000000001)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.boxes_xyxy, two.boxes_xyxy)


def test_frames_of_batches_as_published():
    """A square of 640: by hand, from the aspect ratios alone, half a stride added."""
    sizes = {(640, 480): (512, 672), (480, 640): (672, 512), (640, 640): (672, 672)}
    sizes |= {(320, 240): (512, 672), (2000, 1000): (352, 672), (640, 427): (448, 672)}
    # Half a stride is just filled here, and by one pixel exceeded there.
    sizes |= {(640, 336): (352, 672), (640, 337): (384, 672), (3, 3000): (672, 32)}
    for size, frame in sizes.items():
        assert rectangular_batches(np.array([size]), (640, 640), 8) == [([0], frame)]
    wide_and_tall = np.array([(640, 320), (480, 640), (640, 480)])
    ((members, frame),) = rectangular_batches(wide_and_tall, (640, 640), 8)
    assert sorted(members) == [0, 1, 2] and frame == (672, 672)


pictures = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=40)
square = st.sampled_from(((640, 640), (320, 320)))
frames = st.one_of(square, st.sampled_from(((192, 256), (256, 192))))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(sizes=pictures, fit=frames, batch=st.integers(1, 9))
def test_batches_are_of_like_pictures_in_the_least_frame(sizes, fit, batch):
    plan = rectangular_batches(np.array(sizes, np.int32), fit, batch)
    order = [i for members, _ in plan for i in members]
    assert sorted(order) == list(range(len(sizes)))
    assert all(len(members) == batch for members, _ in plan[:-1])
    aspects = [sizes[i][1] / sizes[i][0] for i in order]
    assert aspects == sorted(aspects)
    for members, frame in plan:
        scales = [min(fit[0] / sizes[i][1], fit[1] / sizes[i][0]) for i in members]
        for side, axis in zip(frame, (1, 0), strict=True):
            longest = max(sizes[i][axis] * s for i, s in zip(members, scales, strict=True))
            assert side % 32 == 0 and longest + 16 - 1e-6 <= side < longest + 48 + 1e-6


@settings(deadline=None, derandomize=True, max_examples=200)
@given(sizes=pictures, side=st.sampled_from((320, 640)), batch=st.integers(1, 9))
def test_a_square_follows_the_published_rule(sizes, side, batch):
    """Written down as it was published, over the aspect ratios (height / width) of a batch."""
    for members, frame in rectangular_batches(np.array(sizes, np.int32), (side, side), batch):
        aspects = [sizes[i][1] / sizes[i][0] for i in members]
        shape = [1.0, 1.0]
        if max(aspects) < 1:
            shape = [max(aspects), 1.0]
        elif min(aspects) > 1:
            shape = [1.0, 1 / min(aspects)]
        exact = [part * side / 32 + 0.5 for part in shape]
        if all(abs(part - round(part)) > 1e-9 or part == side / 32 + 0.5 for part in exact):
            assert frame == tuple(math.ceil(part) * 32 for part in exact)


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_rectangular_batches_are_the_same_at_any_world_size(noise_shards, world):
    reader = ShardReader(noise_shards)
    plan = rectangular_batches(reader.sizes_px(), FRAME, 4)
    assert len(plan) == 15
    found: list[Batch | None] = [None] * len(plan)
    for rank in range(world):
        data = RectangularSet(reader, FRAME, letterbox, plan, rank, world)
        for turn, batch in enumerate(validation_batches(data, 4, 0)):
            found[rank + turn * world] = batch
    for batch, (members, frame) in zip(found, plan, strict=True):
        assert batch is not None and batch.image_ids == tuple(3 * i for i in members)
        assert batch.images.shape == (len(members), *frame, 3)
        for image, where, position in zip(batch.images, batch.frames, members, strict=True):
            picture = reader.decode(position).image
            # As large as in the square frame, and in the middle.
            framed, there = letterbox(picture, *frame, fit_px=FRAME)
            assert where == there and where.scale == letterbox(picture, *FRAME)[1].scale
            np.testing.assert_array_equal(image, framed)
        np.testing.assert_array_equal(
            [(t.width_px, t.height_px) for t in batch.truth], reader.sizes_px()[members]
        )


def test_sizes_are_those_of_the_pictures(coco_files, noise_shards, tmp_path):
    coco_files.shard(tmp_path / "shards")
    for reader in (FileReader(coco_files.read()), ShardReader(tmp_path / "shards")):
        shapes = [reader.decode(i).image.shape[1::-1] for i in range(len(reader))]
        assert reader.sizes_px().tolist() == [list(shape) for shape in shapes]
