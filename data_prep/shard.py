"""A checked data set to WebDataset tars: the same input gives the same bytes, or nothing.

The shards are written into a partial folder and published whole (see `publish`), so that a folder
of the output's name is complete whenever it exists.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from .errors import DataError
from .formats import DetectionDataset, ImageRecord
from .image_header import image_extension
from .manifest import (
    CHUNK,
    MANIFEST_NAME,
    TAR_BLOCK_BYTES,
    VERSION,
    Manifest,
    ShardEntry,
    first_bytes,
    narrow,
)
from .publish import partial_folder, publish
from .samples import encode_annotations, sample_key, stored_image


def write_shards(
    dataset: DetectionDataset,
    output: Path,
    samples_per_shard: int = 512,
    workers: int = 1,
    progress: bool = True,
) -> Manifest:
    """Write a data set as shards and their manifest; if they are there already, do nothing.

    Every image is opened (not decoded) and must be whole and of the annotated size. With several
    workers the calling script needs the usual `if __name__ == "__main__":` guard, because the
    worker processes import it.

    Args:
        dataset: what `read_coco` gives.
        output: the folder to make; it must not exist, be empty, or hold just these shards.
        samples_per_shard: how many images go into a tar.
        workers: processes that write whole shards; their number doesn't change the bytes.
        progress: show a bar, and what was done, on stderr.

    Raises:
        DataError: an image is missing, damaged or not as annotated; the output holds something
            else, or can't be written. Nothing is left behind.
    """
    output = Path(output).resolve()  # a link is followed: the rename must happen beside its target
    for name, value in (("samples_per_shard", samples_per_shard), ("workers", workers)):
        if value < 1:
            raise DataError(f"{name} is {value}; give at least 1.")
    if not dataset.images:
        raise DataError(f"{output}: the data set has no images, so there is nothing to shard.")
    stats = [_stat(record) for record in dataset.images]
    fingerprint = _fingerprint(dataset, [stat.st_size for stat in stats], samples_per_shard)
    try:
        existing = _finished(output, fingerprint, dataset, stats)
        if existing is not None:
            if progress:
                print(f"{output}: holds these {existing.samples} samples already.", file=sys.stderr)
            return existing
        with partial_folder(output) as partial:
            jobs = _jobs(dataset.images, samples_per_shard, partial)
            entries = _write_all(jobs, min(workers, len(jobs)), progress)
            boxes = sum(len(record.labels) for record in dataset.images)
            manifest = Manifest(dataset.categories, boxes, fingerprint, tuple(entries))
            manifest.save(partial)
            publish(partial, output)
    except OSError as error:
        raise DataError(
            f"{output}: the shards can't be written ({error.strerror or error}); "
            "make room there or give another output."
        ) from error
    return manifest


def _stat(record: ImageRecord) -> os.stat_result:
    try:
        return record.path.stat()
    except OSError as error:
        raise DataError(
            f"{record.path}: the image can't be read ({error.strerror}); restore it."
        ) from None


def _fingerprint(dataset: DetectionDataset, file_bytes: list[int], samples_per_shard: int) -> str:
    """sha256 over everything that decides the shards but the images' bytes, which take too long.

    `_changed_image` makes up for the difference.
    """
    digest = hashlib.sha256(repr((VERSION, samples_per_shard, dataset.categories)).encode())
    for record, size in zip(dataset.images, file_bytes, strict=True):
        facts = (record.id, record.file_name, record.width, record.height, record.annotation_ids)
        digest.update(repr((*facts, size)).encode())
        for array in (record.boxes_xyxy, record.labels, record.crowd, record.area):
            digest.update(array.tobytes())
    return digest.hexdigest()


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One shard to write. Travels to a worker process."""

    path: Path
    records: list[ImageRecord]


class _HashedFile:
    """A file to write to that keeps count and digests, so that nothing is read back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._chunks = [hashlib.sha256()]
        self._boundaries: deque[int] = deque()
        self.bytes = 0

    def begin_chunk(self, at: int) -> None:
        """What comes from byte `at` on is another chunk; the tar writer buffers, so it may wait."""
        self._boundaries.append(at)

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        rest = memoryview(data)
        while self._boundaries and self._boundaries[0] < self.bytes + len(rest):
            before = self._boundaries.popleft() - self.bytes
            self._chunks[-1].update(rest[:before])
            self._chunks.append(hashlib.sha256())
            self.bytes += before
            rest = rest[before:]
        self._chunks[-1].update(rest)
        self.bytes += len(rest)
        return self._file.write(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def chunk_digests(self) -> list[int]:
        return [first_bytes(chunk) for chunk in self._chunks]


def _jobs(images: list[ImageRecord], samples_per_shard: int, folder: Path) -> list[_Job]:
    starts = range(0, len(images), samples_per_shard)
    return [
        _Job(folder / f"shard-{index:06d}.tar", images[start : start + samples_per_shard])
        for index, start in enumerate(starts)
    ]


def _write_shard(job: _Job, advance: Callable[[int], object] = lambda count: None) -> ShardEntry:
    from webdataset.writer import TarWriter  # slow: it imports torch

    offsets: list[int] = []
    with job.path.open("wb") as file:
        hashed = _HashedFile(file)
        # Owner, mode and time are fixed, so that the bytes depend on the samples alone.
        with TarWriter(hashed, encoder=False, mtime=0, mode=0o444) as tar:
            for record in job.records:
                try:
                    image = record.path.read_bytes()
                except OSError as error:
                    raise DataError(
                        f"{record.path}: the image can't be read ({error.strerror}); restore it."
                    ) from None
                if offsets and len(offsets) % CHUNK == 0:
                    hashed.begin_chunk(tar.tarstream.offset)
                offsets.append(tar.tarstream.offset)
                tar.write(
                    {
                        "__key__": sample_key(record.id),
                        image_extension(image, record): image,
                        "json": encode_annotations(record),
                    }
                )
                advance(1)
        file.flush()
        os.fsync(file.fileno())
    return ShardEntry(
        name=job.path.name,
        bytes=hashed.bytes,
        sha256=hashed.hexdigest(),
        image_ids=narrow(np.array([record.id for record in job.records], dtype=np.int64)),
        blocks=(np.array(offsets) // TAR_BLOCK_BYTES).astype(np.uint32),
        sizes=np.array([(r.width, r.height) for r in job.records], dtype=np.int32),
        chunk_digests=np.array(hashed.chunk_digests(), dtype=np.uint64),
    )


def _write_all(jobs: list[_Job], workers: int, progress: bool) -> list[ShardEntry]:
    from tqdm import tqdm

    total = sum(len(job.records) for job in jobs)
    with tqdm(total=total, desc="shard", unit="img", delay=1, disable=not progress) as bar:
        if workers == 1:
            return [_write_shard(job, bar.update) for job in jobs]
        # A clean process imports webdataset, and torch with it, once for all workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["webdataset.writer"])
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

        def advance(future: Future[ShardEntry]) -> None:
            if not future.cancelled() and future.exception() is None:
                bar.update(future.result().samples)

        try:
            futures = [pool.submit(_write_shard, job) for job in jobs]
            for future in futures:
                future.add_done_callback(advance)
            return _results(futures)
        except BrokenProcessPool:
            raise DataError(
                "A process that wrote shards was killed (out of memory?); give fewer workers."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _results(futures: list[Future[ShardEntry]]) -> list[ShardEntry]:
    """All results, or the exception of the earliest shard among those that have failed."""
    wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future.done() and (error := future.exception()) is not None:
            raise error
    return [future.result() for future in futures]


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, which stops the pool; and don't outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


# --- an output that is there already -------------------------------------------------------------


def _finished(
    output: Path, fingerprint: str, dataset: DetectionDataset, stats: list[os.stat_result]
) -> Manifest | None:
    """The manifest of an output that needs no work; None if there is no output yet."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    mend = "give another output or remove it"
    if not (output / MANIFEST_NAME).is_file():
        raise DataError(f"{output}: exists and is not a shard folder; {mend}.")
    manifest = Manifest.load(output)
    if manifest.fingerprint != fingerprint:
        raise DataError(f"{output}: holds shards of another input or with other settings; {mend}.")
    if problems := manifest.missing(output):
        raise DataError(problems[0])
    if changed := _changed_image(output, manifest, dataset.images, stats):
        raise DataError(f"{output}: {changed} has changed since these shards were made; {mend}.")
    return manifest


def _changed_image(
    output: Path, manifest: Manifest, images: list[ImageRecord], stats: list[os.stat_result]
) -> Path | None:
    """The first image whose bytes aren't those in the shards. Only newer files are compared."""
    made_ns = (output / MANIFEST_NAME).stat().st_mtime_ns
    places = (
        (entry.name, offset) for entry in manifest.shards for offset in entry.offsets.tolist()
    )
    for record, stat, (name, offset) in zip(images, stats, places, strict=True):
        # The change time: copying tools carry the modification time of the original along.
        newer = max(stat.st_mtime_ns, stat.st_ctime_ns) > made_ns
        if newer and stored_image(output / name, offset) != record.path.read_bytes():
            return record.path
    return None
