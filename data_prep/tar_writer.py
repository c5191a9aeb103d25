"""One shard: images checked, and written as a tar of the same bytes on every machine.

Nothing here imports torch, as webdataset's own writer does: that takes longer than the work on a
few hundred images. The bytes are those of that writer.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from .errors import RefusedError
from .image_header import check_image, unreadable
from .manifest import CHUNK, TAR_BLOCK_BYTES, ShardEntry, first_bytes, narrow
from .records import ImageRecord
from .samples import encode_annotations, sample_key


@dataclass(frozen=True)
class Job:
    """One shard to write. Travels to a worker process."""

    path: Path
    records: Sequence[ImageRecord]
    fingerprint: str  # of all that decides the shard
    strict: bool  # an image that can't be used is an error


@dataclass(frozen=True)
class Verdict:
    """What the check of one image found: an extension, or why it is refused."""

    extension: str = ""
    kind: str = ""
    sentence: str = ""


@dataclass(frozen=True, eq=False)
class Written:
    """One shard that is done."""

    entry: ShardEntry | None  # None: all of its images are refused, and there is no tar
    boxes: int
    refused: list[tuple[str, str]]  # kind and sentence


def check_images(records: Sequence[ImageRecord], strict: bool) -> list[Verdict]:
    """Read and decode images.

    Raises:
        RefusedError: strict, and one can't be used.
    """
    return [_checked(record, strict)[0] for record in records]


def _checked(record: ImageRecord, strict: bool) -> tuple[Verdict, bytes]:
    try:
        data = _read(record)
        return Verdict(check_image(data, record)), data
    except RefusedError as error:
        if strict:
            raise
        return Verdict(kind=error.kind, sentence=str(error)), b""


def _read(record: ImageRecord) -> bytes:
    try:
        return record.path.read_bytes()
    except OSError as error:
        raise unreadable(record.path, error) from None


def write_shard(
    job: Job,
    verdicts: Sequence[Verdict] | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Written:
    """Write one tar, durably.

    Args:
        job: what goes into it, and where it goes.
        verdicts: on each image, from `check_images`; None: it is checked here.
        advance: is told of every image that is done.

    Raises:
        RefusedError: an image can't be used, and the job is strict; or it vanished since its check.
        OSError: the file can't be written.
    """
    kept: list[ImageRecord] = []
    offsets: list[int] = []
    refused = []
    with job.path.open("wb") as file:
        tar = _Tar(file)
        for position, record in enumerate(job.records):
            if verdicts is None:
                verdict, image = _checked(record, job.strict)
            else:
                verdict = verdicts[position]
                image = _read(record) if verdict.extension else b""
            advance(1)
            if not verdict.extension:
                refused.append((verdict.kind, verdict.sentence))
                continue
            if kept and len(kept) % CHUNK == 0:
                tar.begin_chunk()
            kept.append(record)
            offsets.append(tar.bytes)
            members = {verdict.extension: image, "json": encode_annotations(record)}
            for extension in sorted(members):  # as webdataset's writer has them
                tar.add(f"{sample_key(record.id)}.{extension}", members[extension])
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    if not kept:
        job.path.unlink()
        return Written(None, 0, refused)
    entry = ShardEntry(
        name=job.path.name,
        bytes=tar.bytes,
        sha256=tar.digest.hexdigest(),
        image_ids=narrow(np.array([record.id for record in kept], dtype=np.int64)),
        blocks=(np.array(offsets) // TAR_BLOCK_BYTES).astype(np.uint32),
        sizes=np.array([(r.width, r.height) for r in kept], dtype=np.int32),
        chunk_digests=np.array([first_bytes(chunk) for chunk in tar.chunks], dtype=np.uint64),
    )
    return Written(entry, sum(len(record.labels) for record in kept), refused)


class _Tar:
    """A tar that keeps count and digests while it is written, so that nothing is read back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.chunks = [hashlib.sha256()]
        self.bytes = 0

    def begin_chunk(self) -> None:
        """What comes from here on is another chunk."""
        self.chunks.append(hashlib.sha256())

    def add(self, name: str, data: bytes) -> None:
        """A member. Owner, mode and time are fixed, so that the bytes depend on the data alone."""
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = len(data), 0, 0o444
        member.uname = member.gname = "bigdata"  # as webdataset writes
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(data)
        self._write(bytes(-len(data) % TAR_BLOCK_BYTES))

    def close(self) -> None:
        """The end of the archive: two empty blocks, and more up to a whole record."""
        end = self.bytes + 2 * TAR_BLOCK_BYTES
        self._write(bytes(2 * TAR_BLOCK_BYTES + -end % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self.digest.update(data)
        self.chunks[-1].update(data)
        self.bytes += len(data)
        self._file.write(data)
