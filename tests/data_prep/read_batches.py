"""Prints the hash of each training batch: `read_batches.py LOCATION CACHE WORKERS BATCHES`."""

import hashlib
import sys

from convnext_yolo.data_prep.augment import Augmentation
from convnext_yolo.data_prep.cache import CacheOptions
from convnext_yolo.data_prep.loader import training_batches
from convnext_yolo.data_prep.reader import ShardReader
from convnext_yolo.data_prep.stream import BatchPlan, TrainStream
from convnext_yolo.model.letterbox import fit


def main(location: str, cache: str, workers: int, batches: int) -> None:
    reader = ShardReader(location, CacheOptions(cache, 1, 60))
    plan = BatchPlan(global_batch=8, micro_batch=4, rank=0, world_size=1)
    strong = Augmentation(0.7, 0.5, 0.1, 0.5, 0.5, 0.1, 0.7, 0.4)
    stream = TrainStream(reader, plan, 7, 0, (64, 96), lambda step: strong, fit)
    made = training_batches(stream, workers)
    for _ in range(batches):
        batch = next(made)
        digest = hashlib.sha256(repr(batch.image_ids).encode())
        for tensor in (batch.images, batch.image_index, batch.labels, batch.boxes_xyxy):
            digest.update(repr((tensor.dtype, tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        print(digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
