"""Shards written by several processes, whatever their number and size.

The images of a shard are checked in pieces, by whoever is free; then one process writes the tar. So
a single shard keeps all processes busy, and the bytes don't depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from .pool import worker_pool
from .tar_writer import Job, Verdict, Written, check_images, write_shard

_PIECE = 32  # images that are checked in one go: a fraction of a second


def write_all(
    jobs: Iterable[Job],
    workers: int,
    advance: Callable[[int], object],
    done: Callable[[Job, Written], object],
) -> None:
    """Write shards; each is handed over as soon as it is done, in any order.

    Args:
        jobs: the shards.
        workers: processes; with 1 this one does it.
        advance: is told of images that are done.
        done: is given every shard that is done, in this process; while it takes its time, only a
            few more shards are made.

    Raises:
        DataError: strict, and an image can't be used; or a process was killed.
        OSError: a shard can't be written.
    """
    if workers == 1:
        for job in jobs:
            done(job, write_shard(job, advance=advance))
        return
    with worker_pool(workers, "wrote shards", [write_shard.__module__]) as pool:
        _run(pool, iter(jobs), workers + 2, advance, done)


class _Shard:
    """A shard in the making: its pieces are checked, then it is written."""

    def __init__(self, pool: ProcessPoolExecutor, job: Job) -> None:
        starts = range(0, len(job.records), _PIECE)
        self.job = job
        self.pieces: list[Future[list[Verdict]]] = [
            pool.submit(check_images, job.records[start : start + _PIECE], job.strict)
            for start in starts
        ]
        self.tar: Future[Written] | None = None

    def write(self, pool: ProcessPoolExecutor) -> Future[Written] | None:
        """Begins to write if all pieces are checked."""
        if not all(piece.done() for piece in self.pieces):
            return None
        verdicts = [verdict for piece in self.pieces for verdict in piece.result()]
        self.tar = pool.submit(write_shard, self.job, verdicts)
        return self.tar


def _run(
    pool: ProcessPoolExecutor,
    jobs: Iterable[Job],
    at_once: int,
    advance: Callable[[int], object],
    done: Callable[[Job, Written], object],
) -> None:
    jobs = iter(jobs)
    pending: dict[Future[Any], _Shard] = {}
    active = 0
    while True:
        while active < at_once and (job := next(jobs, None)) is not None:
            shard = _Shard(pool, job)
            pending.update(dict.fromkeys(shard.pieces, shard))
            active += 1
        if not pending:
            return
        finished, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in finished:
            shard = pending.pop(future)
            result = future.result()
            if isinstance(result, Written):
                active -= 1
                done(shard.job, result)
                continue
            advance(len(result))
            if shard.tar is None and (tar := shard.write(pool)) is not None:
                pending[tar] = shard
