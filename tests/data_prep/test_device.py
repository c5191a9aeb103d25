"""Samples composed on the training device, here a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnext_yolo.data_prep.batch import Batch
from convnext_yolo.data_prep.device import DeviceComposer
from convnext_yolo.data_prep.formats import Category, DetectionDataset, ImageRecord
from convnext_yolo.data_prep.loader import parts_of_batches, training_batches
from convnext_yolo.data_prep.order import WINDOW
from convnext_yolo.data_prep.reader import ShardReader
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.data_prep.stream import BatchPlan, TrainStream
from convnext_yolo.model.letterbox import fit

from .streams import FRAME, GLOBAL, STEPS, global_batches, sha256, stream_of, strengths

process = pytest.mark.process
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on few cores


def device_batches(
    noise_shards: Path, world: int, workers: int, start: int, count: int
) -> list[list[Batch]]:
    return global_batches(noise_shards, world, workers, start, count, on_device=True)


def test_the_device_composes_the_same_samples(noise_shards):
    """Same boxes to the bit; pixels up to the rounding of two resizes."""
    here = global_batches(noise_shards, 1, 0, 0, STEPS)
    there = device_batches(noise_shards, 1, 0, 0, STEPS)
    apart = []
    for one, two in zip(here, there, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.image_ids == b.image_ids
            for field in ("boxes_xyxy", "labels", "image_index"):
                assert torch.equal(getattr(a, field), getattr(b, field))
            assert b.images.shape == a.images.shape and b.images.dtype == torch.uint8
            apart.append((a.images.int() - b.images.int()).abs())
    differences = torch.cat(apart)
    assert differences.max() <= 6  # a level of rounding before a strong colour matrix
    assert differences.float().mean() < 0.5


@process
@pytest.mark.parametrize(
    ("world", "workers", "start"), [(1, 1, 0), (8, 0, 1), (2, 3, 0), (1, 3, 3)]
)
def test_batches_of_the_device_are_the_same_whoever_made_them(noise_shards, world, workers, start):
    expected = [sha256(step) for step in device_batches(noise_shards, 1, 0, 0, 2 * STEPS)]
    steps = device_batches(noise_shards, world, workers, start, 2 * STEPS - start)
    assert [sha256(step) for step in steps] == expected[start:]


def test_the_device_keeps_no_more_than_the_windows(noise_shards):
    stream = stream_of(ShardReader(noise_shards), on_device=True)
    composer = DeviceComposer(stream, torch.device("cpu"))
    parts_of = parts_of_batches(stream, 0)
    for _ in range(4 * STEPS * stream.plan.accumulation):
        parts, pixels = next(parts_of)
        composer.compose(parts, pixels)
    assert len(composer.windows) <= GLOBAL * (WINDOW + 1)


def test_workers_send_a_picture_once(noise_shards):
    stream = stream_of(ShardReader(noise_shards), start=1, on_device=True)
    parts_of = parts_of_batches(stream, 0)
    places = []
    for _ in range(4 * STEPS * stream.plan.accumulation):
        parts, _ = next(parts_of)
        places += [place for part in parts for place in part.places]
    assert len(set(places)) == len(places)
    assert min(step for _, step in places) >= 1 - WINDOW


def test_large_and_odd_pictures_travel_whole(tmp_path):
    """Larger than the frame in one way or both, and tiny ones."""
    shapes = [(64, 96), (200, 300), (20, 300), (300, 20), (1, 1), (64, 97), (3, 96), (63, 95)]
    records = []
    for i, (height, width) in enumerate(shapes):
        path = tmp_path / f"{i}.jpg"
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=95)
        records.append(image_record(i, path, width, height))
    dataset = DetectionDataset((Category(1, "a"),), records)
    shard_dataset(dataset, tmp_path / "shards", progress=False)
    reader = ShardReader(tmp_path / "shards")
    streams = [
        TrainStream(reader, BatchPlan(4, 4, 0, 1), 0, 0, FRAME, strengths, fit, on_device)
        for on_device in (False, True)
    ]
    here, there = (training_batches(stream, 0) for stream in streams)
    for _ in range(6):
        one, two = next(here), next(there)
        assert one.image_ids == two.image_ids
        assert torch.equal(one.boxes_xyxy, two.boxes_xyxy)
        assert (one.images.int() - two.images.int()).abs().float().mean() < 1


def image_record(image_id: int, path: Path, width: int, height: int) -> ImageRecord:
    """With one box, of the middle of the picture."""
    return ImageRecord(
        id=image_id,
        file_name=path.name,
        path=path,
        width=width,
        height=height,
        boxes_xyxy=np.array([[width / 4, height / 4, width, height]], np.float32),
        labels=np.zeros(1, np.int64),
        crowd=np.zeros(1, bool),
        area=np.ones(1, np.float32),
        annotation_ids=[image_id],
    )
