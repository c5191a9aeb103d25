"""Loader processes under stress: mistakes, signals, forks."""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch

from convnext_yolo.data_prep.augment import Augmentation
from convnext_yolo.data_prep.batch import Batch
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.loader import training_batches
from convnext_yolo.data_prep.reader import Sample, ShardReader
from convnext_yolo.data_prep.stream import BatchPlan, TrainStream
from convnext_yolo.data_prep.validation import ValidationSet, validation_batches
from convnext_yolo.model.letterbox import fit, letterbox

pytestmark = pytest.mark.process

FRAME = (64, 96)
STRONG = Augmentation(0.7, 0.5, 0.1, 0.5, 0.5, 0.1, 0.7, 0.4)


def batches_of(reader: ShardReader, workers: int) -> Iterator[Batch]:
    plan = BatchPlan(global_batch=8, micro_batch=4, rank=0, world_size=1)
    stream = TrainStream(reader, plan, 0, 0, FRAME, lambda step: STRONG, fit)
    return training_batches(stream, workers)


def take(batches: Iterator[Batch], count: int) -> torch.Tensor:
    return torch.cat([next(batches).images for _ in range(count)])


class Broken(ShardReader):
    """Its 41st picture can't be read."""

    def decode(self, position: int, out: np.ndarray | None = None) -> Sample:
        if position == 40:
            raise DataError("shard s.tar: picture p.jpg can't be decoded; mend it")
        return super().decode(position, out)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_the_data_is_one_sentence_from_a_worker_too(noise_shards, workers):
    reader = Broken(noise_shards)
    training = batches_of(reader, workers)
    validation = validation_batches(ValidationSet(reader, FRAME, letterbox), 4, workers)
    for batches in (training, validation):
        with pytest.raises(DataError) as error:
            take(batches, 100)
        assert str(error.value) == "shard s.tar: picture p.jpg can't be decoded; mend it"
        assert error.value.on_one_rank  # the command line prints it on any rank
    assert not multiprocessing.active_children()


def test_workers_leave_signals_to_their_rank(noise_shards):
    """A scheduler signals every process of a job, and the rank still needs batches to stop at."""
    expected = take(batches_of(ShardReader(noise_shards), 0), 20)
    batches = batches_of(ShardReader(noise_shards), 2)
    first = take(batches, 1)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in ("TERM", "INT", "USR1"):  # by somebody who is not their rank
            subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    assert torch.equal(torch.cat((first, take(batches, 19))), expected)
    del batches
    for worker in workers:
        worker.join(timeout=30)
        assert worker.exitcode == 0


def test_a_worker_that_is_killed_is_a_sentence(noise_shards):
    batches = batches_of(ShardReader(noise_shards), 2)
    take(batches, 1)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(DataError, match=r"a loader process was killed.*take fewer data\.workers"):
        take(batches, 20)


def test_too_little_shared_memory_is_a_sentence(noise_shards, monkeypatch):
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(DataError, match=r"need \d+ MiB of shared memory .* --shm-size"):
        take(batches_of(ShardReader(noise_shards), 2), 1)


def test_workers_end_when_their_rank_terminates_them(noise_shards):
    """As multiprocessing does when a rank exits, and then waits for them for ever."""
    batches = batches_of(ShardReader(noise_shards), 2)
    take(batches, 1)
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=30)
        assert worker.exitcode == 0


def test_workers_start_however_busy_opencv_was(noise_shards):
    """A forked child that touches OpenCV's inherited threads hangs now and then: 5 forks in 20."""
    image = np.zeros((480, 640, 3), np.uint8)
    matrix = np.array([[1.1, 0, 3], [0, 1.1, 2]])
    expected = take(batches_of(ShardReader(noise_shards), 0), 1)
    for _ in range(6):
        cv2.setNumThreads(2)
        cv2.warpAffine(image, matrix, (640, 480))
        assert torch.equal(take(batches_of(ShardReader(noise_shards), 1), 1), expected)
