"""One shard, read again and compared with its entry in the manifest.

It is read once, from its first byte to its last: what the tar reader takes goes through the
digests on its way.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .manifest import CHUNK, ShardEntry, first_bytes
from .samples import IMAGE_EXTENSIONS, check_sample

_PROBLEMS_PER_SHARD = 5  # one shifted byte makes every sample of a shard wrong
_AGAIN = "fetch or make the shard again"
_READ_AHEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardJob:
    """One shard to verify. Travels to a worker process."""

    path: Path
    entry: ShardEntry
    class_count: int
    images: bool  # decode them


@dataclass(frozen=True)
class Found:
    """What is wrong with one shard, and how many boxes it holds."""

    problems: list[str]
    boxes: int = 0


class _HashedReader:
    """A file that is read forwards only, all that goes by being hashed: whole and by chunk.

    Args:
        file: open at its beginning.
        chunk_starts: bytes at which chunks begin, rising; the first is taken as 0.
        advance: is told the bytes of each read.
    """

    def __init__(self, file: IO[bytes], chunk_starts: list[int], advance: Callable[[int], Any]):
        self._file, self._advance = file, advance
        self._whole = hashlib.sha256()
        self._chunks = [hashlib.sha256() for _ in chunk_starts]
        self._ends = [*chunk_starts[1:], None]
        self._chunk = 0
        self._at = 0
        self.bytes = os.fstat(file.fileno()).st_size

    def read(self, size: int) -> bytes:
        # A broken tar asks for sizes that no memory holds.
        data = self._file.read(max(0, min(size, self.bytes - self._at)))
        self._whole.update(data)
        rest = memoryview(data)
        while (end := self._ends[self._chunk]) is not None and end <= self._at + len(rest):
            self._chunks[self._chunk].update(rest[: end - self._at])
            rest = rest[end - self._at :]
            self._at, self._chunk = end, self._chunk + 1
        self._chunks[self._chunk].update(rest)
        self._at += len(rest)
        self._advance(len(data))
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < self._at:
            raise tarfile.StreamError("a member points backwards")
        while self._at < position and self.read(min(position - self._at, _READ_AHEAD_BYTES)):
            pass

    def digests(self) -> tuple[str, list[int]]:
        """The sha256 of the whole file, and the chunks' as the manifest keeps them."""
        self.seek(self.bytes)
        return self._whole.hexdigest(), [first_bytes(chunk) for chunk in self._chunks]


def verify_shard(job: ShardJob, advance: Callable[[int], Any]) -> Found:
    """All that is wrong with one shard; of the many problems of one that is badly broken, few."""
    try:
        with job.path.open("rb", buffering=_READ_AHEAD_BYTES) as file:
            hashed = _HashedReader(file, job.entry.offsets[::CHUNK].tolist(), advance)
            found = _verify_samples(job, hashed)
            problems = _byte_problems(job, hashed) + found.problems
    except FileNotFoundError:
        return Found([f"{job.path}: the shard is missing; {_AGAIN}."])
    except OSError as error:
        return Found([f"{job.path}: can't be read ({error.strerror or error}); make it readable."])
    more = len(problems) - _PROBLEMS_PER_SHARD
    if more > 0:
        problems[_PROBLEMS_PER_SHARD:] = [f"{job.path}: {more} more problems like these."]
    return Found(problems, found.boxes)


def _byte_problems(job: ShardJob, hashed: _HashedReader) -> list[str]:
    """Size and digests; where a digest is another, which samples the difference lies in."""
    path, entry = job.path, job.entry
    problems = []
    sha256, chunks = hashed.digests()
    if hashed.bytes != entry.bytes:
        problems.append(
            f"{path}: has {hashed.bytes} bytes, the manifest says {entry.bytes}; {_AGAIN}."
        )
    spoilt = np.flatnonzero(np.array(chunks, np.uint64) != entry.chunk_digests).tolist()
    where = ""
    if spoilt:
        keys = entry.keys[spoilt[0] * CHUNK :][:CHUNK]
        start, end = entry.chunk(spoilt[0])
        others = f" and {len(spoilt) - 1} more chunks" if len(spoilt) > 1 else ""
        where = f"bytes {start} to {end}, samples {keys[0]} to {keys[-1]}{others}"
    if sha256 != entry.sha256:
        problems.append(
            f"{path}: sha256 is {sha256[:12]}…, the manifest says {entry.sha256[:12]}…"
            f"{' (' + where + ')' if where else ''}; {_AGAIN}."
        )
    elif where:
        problems.append(
            f"{path}: its sha256 is the manifest's, but a chunk's is not ({where}); "
            "the manifest is damaged, fetch it or make the shards again."
        )
    return problems


def _verify_samples(job: ShardJob, hashed: _HashedReader) -> Found:
    """Compares every sample with the manifest."""
    path, entry = job.path, job.entry
    expected = zip(entry.keys, entry.offsets.tolist(), entry.sizes.tolist(), strict=True)
    problems = []
    count = boxes = 0
    try:
        for key, offset, members in _walk(hashed):
            count += 1
            key_listed, offset_listed, size_px = next(expected, ("", 0, [0, 0]))
            if (key, offset) != (key_listed, offset_listed):
                listed = f"{key_listed} at {offset_listed}" if key_listed else "nothing more"
                held = f"{_printable(key)} at byte {offset}"
                problems.append(f"{path}: holds {held}, the manifest says {listed}; {_AGAIN}.")
                continue
            width, height = size_px
            problem, its_boxes = check_sample(members, int(key), (width, height), job.class_count)
            if job.images and not problem:
                problem = _image_problem(members, width, height)
            if problem:
                problems.append(f"{path}: sample {key} {problem}; {_AGAIN}.")
            boxes += its_boxes
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        problems.append(f"{path}: the tar is broken after {count} samples ({error}); {_AGAIN}.")
    if count != entry.samples:
        problems.append(
            f"{path}: {count} samples can be read, the manifest says {entry.samples}; {_AGAIN}."
        )
    return Found(problems, boxes)


def _walk(file: _HashedReader) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    """The samples of a plain tar: key, offset in bytes, members by extension.

    Neighbouring members with one key are a sample, as in webdataset.

    Raises:
        tarfile.TarError, ValueError: the tar is cut short or broken.
    """
    key, offset = "", 0
    members: dict[str, bytes] = {}
    # Neither rewound nor asked for more than `_HashedReader` has: every member is read in its turn.
    with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            member_key, _, extension = member.name.partition(".")
            if member_key != key and members:
                yield key, offset, members
            if member_key != key or not members:
                key, offset, members = member_key, member.offset, {}
            if extension in members:
                raise ValueError(f"the member {_printable(member.name)} comes twice")
            # Of sparse members a damaged header makes gigabytes of zeros.
            is_plain = member.isreg() and not member.issparse()
            content = tar.extractfile(member) if is_plain else None
            members[extension] = content.read() if content is not None else b""
            tar.members.clear()  # or it keeps them all
    if members:
        yield key, offset, members


def _printable(name: str) -> str:
    """A name from a tar, which if damaged holds anything."""
    return name if name.isprintable() else ascii(name)


def _image_problem(members: dict[str, bytes], width: int, height: int) -> str:
    """What is wrong with a sample's picture once it is decoded, in a few words, or nothing."""
    from .decode import decode_image  # slow: it imports OpenCV

    (encoded,) = (members[extension] for extension in members if extension in IMAGE_EXTENSIONS)
    try:
        found_height, found_width = decode_image(encoded).shape[:2]
    except ValueError as error:
        return str(error)
    if (found_width, found_height) != (width, height):
        found = f"{found_width}x{found_height}"
        return f"holds a picture of {found} pixels, the manifest says {width}x{height}"
    return ""
