"""`verify`: reads shards again and says what is not as their manifest has it.

Shards are dealt to worker processes; the answer is put together in the manifest's order, so it
does not depend on them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import MANIFEST_NAME, Manifest
from .pool import worker_pool
from .verify_shard import Found, ShardJob, verify_shard

# Below this one process has read everything before others have started; decoding takes longer.
_SMALL_BYTES, _SMALL_IMAGE_BYTES = 256 << 20, 16 << 20
_LOOK_S = 0.1  # between two looks at how far the workers are
_MAX_WORKERS = 4  # unless told otherwise: more of them only wait for the disk


def verify(
    folder: Path, workers: int | None = None, images: bool = False, progress: bool = True
) -> list[str]:
    """Hash and read every shard again and compare with the manifest.

    A script that calls this for a large folder, or with workers, needs the usual
    `if __name__ == "__main__":` guard, because the worker processes import it.

    Args:
        folder: of the shards; files that are not shards are left alone.
        workers: processes; None: up to four, and one for a small folder.
        images: decode every picture as training does and compare its size.
        progress: show a bar over the bytes on stderr if it takes longer.

    Returns:
        One sentence per problem, in the order of the shards; empty if all is well.

    Raises:
        DataError: there is no manifest to compare with (see `Manifest.load`), or a worker process
            was killed.
    """
    from tqdm import tqdm

    folder = Path(folder)
    manifest = Manifest.load(folder)
    jobs = [
        ShardJob(folder / entry.name, entry, len(manifest.classes), images)
        for entry in manifest.shards
    ]
    if workers is None:
        is_small = manifest.bytes < (_SMALL_IMAGE_BYTES if images else _SMALL_BYTES)
        workers = 1 if is_small else min(_MAX_WORKERS, os.cpu_count() or 1)
    bar = tqdm(
        total=manifest.bytes,
        desc="verify",
        unit="B",
        unit_scale=True,
        delay=1,
        disable=not progress,
    )
    with bar:
        if min(workers, len(jobs)) <= 1:
            found = [verify_shard(job, bar.update) for job in jobs]
        else:
            found = _in_processes(jobs, min(workers, len(jobs)), bar.update)
    problems = _folder_problems(folder, manifest)
    problems += itertools.chain.from_iterable(shard.problems for shard in found)
    boxes = sum(shard.boxes for shard in found)
    if not problems and boxes != manifest.boxes:
        problems.append(
            f"{folder / MANIFEST_NAME}: boxes is {manifest.boxes} but the shards hold {boxes}; "
            "make the shards again."
        )
    return problems


def _folder_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the shards together."""
    names = {entry.name for entry in manifest.shards}
    problems = [
        f"{path}: the manifest doesn't list this shard; remove it or make the shards again."
        for path in sorted(folder.glob("*.tar"))
        if path.name not in names
    ]
    ids = np.concatenate([entry.image_ids for entry in manifest.shards])
    if len(np.unique(ids)) != len(ids):
        problems.append(f"{folder}: an image is in two samples; make the shards again.")
    return problems


# Of a worker process: the bytes read of each shard. Shared memory without a lock, which a process
# that is killed would leave closed.
_done_bytes: Any = None


def _in_processes(jobs: list[ShardJob], workers: int, update: Callable[[int], Any]) -> list[Found]:
    """All shards, `workers` at a time; in the order of the jobs."""
    decoder = [f"{__package__}.decode"] if jobs[0].images else []
    done_bytes = multiprocessing.get_context("forkserver").RawArray("q", len(jobs))
    shown = 0
    with worker_pool(workers, "read shards", [__name__, *decoder], _share, (done_bytes,)) as pool:
        futures = [pool.submit(_work, i, job) for i, job in enumerate(jobs)]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_LOOK_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # an exception ends all
            now = sum(done_bytes)
            update(now - shown)
            shown = now
        return [future.result() for future in futures]


def _share(done_bytes: Any) -> None:
    global _done_bytes
    _done_bytes = done_bytes


def _work(index: int, job: ShardJob) -> Found:
    def advance(count: int) -> None:
        _done_bytes[index] += count

    return verify_shard(job, advance)
