"""`verify --stream`: the training batches of any number of ranks and workers, as hashes.

Two people who print the same lines train on the same batches, whatever machines they have.
"""

import hashlib
from collections.abc import Iterator

import torch

from ..data_prep.batch import Batch
from ..data_prep.loader import training_batches
from ..data_prep.reader import ShardReader
from .build import cache_options
from .config import Recipe
from .data import training_stream
from .distributed import World
from .engine import batch_plan


def stream_digests(
    recipe: Recipe, shards: str, world_size: int, workers: int, start_step: int = 0
) -> Iterator[tuple[int, str]]:
    """The number and sha256 of each global batch from a step on, without end.

    Every rank's stream is run as that rank would run it, with worker processes of its own, one
    rank after the other. The hash is over pixels, boxes, classes and image ids in the order of the
    lanes, which no rank or worker decides.

    Args:
        recipe: whose batches.
        shards: folder or URL.
        world_size, workers: ranks, and loader processes of each.
        start_step: the first global batch, as after a resume.

    Raises:
        DataError, RecipeError: shards that can't be read, or a world size that does not divide.
    """
    reader = ShardReader(shards, cache_options(recipe.data))
    device = torch.device("cpu")
    ranks = []
    for rank in range(world_size):
        plan = batch_plan(recipe, World(rank, world_size, rank, device))
        stream = training_stream(recipe, reader, plan, start_step)
        ranks.append(training_batches(stream, workers))
    step = start_step
    while True:
        digest = hashlib.sha256()
        for _ in range(plan.accumulation):
            for batches in ranks:
                _add(digest, next(batches))
        yield step, digest.hexdigest()
        step += 1


def _add(digest: "hashlib._Hash", batch: Batch) -> None:
    for tensor in (batch.images, batch.image_index, batch.boxes_xyxy, batch.labels):
        digest.update(tensor.contiguous().numpy().data)
    digest.update(repr(batch.image_ids).encode())
