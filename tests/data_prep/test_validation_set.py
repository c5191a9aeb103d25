from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.reader import FileReader, Sample, ShardReader
from convnext_yolo.data_prep.stream import Batch, ValidationSet, validation_batches
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
