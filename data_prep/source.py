"""Where the bytes of shards come from: a folder on disk, or a URL through a local cache.

Both give an open file and the place in it where a sample begins. On disk the file is the shard;
of a URL it is the chunk that holds the sample (see `manifest`), since an epoch reads shards in
pieces of a few neighbouring samples and whole ones would be fetched again and again.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from .cache import CacheOptions, ChunkCache
from .errors import DataError
from .manifest import (
    CHUNK,
    MANIFEST_NAME,
    TAR_BLOCK_BYTES,
    Manifest,
    ShardEntry,
    first_bytes,
)
from .remote import RemoteFolder, is_url

MAX_OPEN_FILES = 32
MAX_UNCACHED_BYTES = 64 << 20  # chunks in memory where the cache can't hold them
_UNKNOWN, _GOOD, _DAMAGED = range(3)


class DamagedChunkError(OSError):
    """What a host sends for a chunk is not what the manifest describes."""


class ShardSource(Protocol):
    """Shards to read samples from."""

    entries: tuple[ShardEntry, ...]  # without `sizes`: they travel to the loader processes

    def open_at(self, shard: int, within: int) -> tuple[IO[bytes], int]:
        """An open file, and the byte in it at which a sample's first tar header begins.

        The file stays the source's: it is neither to be closed nor to be kept.

        Args:
            shard: its number in the manifest.
            within: the sample's number in the shard.

        Raises:
            DataError: the shard is not there or can't be reached.
            DamagedChunkError: this part of it can't be used.
        """
        ...

    def where(self, shard: int) -> str:
        """A shard's path or URL, for sentences."""
        ...


def load_manifest(
    location: Path | str, patience_s: float = CacheOptions.patience_s, **options: Any
) -> Manifest:
    """Reads the manifest of a shard folder, on disk or at a URL.

    Args:
        location: the folder.
        patience_s: how long a host may stay away.
        options: of `RemoteFolder`.

    Raises:
        DataError: no such folder or host, no access, a damaged manifest.
    """
    if not is_url(location):
        return Manifest.load(Path(location))
    folder = RemoteFolder(str(location), patience_s, **options)
    mend = "give the URL of a folder that `convnext-yolo shard` made"
    return Manifest.parse(folder.read(MANIFEST_NAME, mend=mend), folder.shown(MANIFEST_NAME))


def open_source(
    location: Path | str, manifest: Manifest, cache: CacheOptions | None = None
) -> ShardSource:
    """The shards of a manifest, which lie beside it."""
    if is_url(location):
        return RemoteShards(str(location), manifest, cache or CacheOptions())
    return LocalShards(Path(location), manifest)


class OpenFiles:
    """The files that were read last, open. Another process, forked or not, begins with none."""

    def __init__(self) -> None:
        self.files: OrderedDict[Hashable, IO[bytes]] = OrderedDict()
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": OrderedDict(), "_owner": -1}

    def get(self, key: Hashable) -> IO[bytes] | None:
        if self._owner != os.getpid():  # an inherited file has one position for both processes
            self.files, self._owner = OrderedDict(), os.getpid()
        if key in self.files:
            self.files.move_to_end(key)
        return self.files.get(key)

    def put(self, key: Hashable, file: IO[bytes]) -> None:
        """Adds a file that `get` did not find."""
        self.files[key] = file
        if len(self.files) > MAX_OPEN_FILES:
            self.files.popitem(last=False)[1].close()
        in_memory = {
            k: f.getbuffer().nbytes for k, f in self.files.items() if isinstance(f, io.BytesIO)
        }
        total = sum(in_memory.values())
        for old, size in in_memory.items():
            if total <= MAX_UNCACHED_BYTES or old == key:
                break
            self.files.pop(old).close()
            total -= size


class LocalShards:
    """Shards in a folder."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.entries = folder, _without_sizes(manifest)
        self.opened = OpenFiles()

    def open_at(self, shard: int, within: int) -> tuple[IO[bytes], int]:
        offset = int(self.entries[shard].blocks[within]) * TAR_BLOCK_BYTES
        file = self.opened.get(shard)
        if file is None:
            try:
                file = open(self.where(shard), "rb")  # noqa: SIM115 - kept open over many reads
            except OSError as error:
                raise DataError(
                    f"shard {self.where(shard)}: {error.strerror}; "
                    "the manifest names it, so shard the data again"
                ) from error
            self.opened.put(shard, file)
        return file, offset

    def where(self, shard: int) -> str:
        return str(self.folder / self.entries[shard].name)


class RemoteShards:
    """Shards at a URL, fetched by chunks.

    Every chunk is checked against its digest when this process first meets it, whether it comes
    from the host or from the cache.

    Args:
        url: of the folder that holds them.
        manifest: which came from there.
        cache: where chunks are kept, and how long the host may stay away.
        options: of `RemoteFolder`.

    Raises:
        DataError: the cache folder can't be used.
    """

    def __init__(self, url: str, manifest: Manifest, cache: CacheOptions, **options: Any):
        self.entries = _without_sizes(manifest)
        self.folder = RemoteFolder(url, cache.patience_s, known_host=True, **options)
        self.cache = ChunkCache(Path(cache.folder).expanduser(), int(cache.gib * 2**30))
        self.opened = OpenFiles()
        # A fingerprint is what the manifest says: hashed, it is a folder's name whatever it says.
        fingerprint = hashlib.sha256(manifest.fingerprint.encode(errors="replace"))
        self._data_set = fingerprint.hexdigest()[:16]
        self._first = np.cumsum([0, *(len(entry.chunk_digests) for entry in self.entries)])
        self._states = bytearray(int(self._first[-1]))  # of each chunk, as this process found it

    def open_at(self, shard: int, within: int) -> tuple[IO[bytes], int]:
        number = within // CHUNK
        start, _ = self.entries[shard].chunk(number)
        key = int(self._first[shard]) + number
        file = self.opened.get(key)
        if file is None:
            file = self._cached(shard, number, key) or self._fetched(shard, number, key)
            self.opened.put(key, file)
        return file, int(self.entries[shard].blocks[within]) * TAR_BLOCK_BYTES - start

    def where(self, shard: int) -> str:
        return self.folder.shown(self.entries[shard].name)

    def _name(self, shard: int, number: int) -> str:
        # With the digest: shards made anew from other pictures can have the same fingerprint.
        entry = self.entries[shard]
        return f"{self._data_set}/{entry.name}/{number}-{int(entry.chunk_digests[number]):016x}"

    def _cached(self, shard: int, number: int, key: int) -> IO[bytes] | None:
        start, end = self.entries[shard].chunk(number)
        file = self.cache.open(self._name(shard, number), end - start)
        if file is None or self._states[key] == _GOOD:
            return file
        if not self._is_good(file.read(), shard, number):  # a disk that forgets, or a crash
            file.close()
            return None
        self._states[key] = _GOOD
        return file

    def _fetched(self, shard: int, number: int, key: int) -> IO[bytes]:
        entry, name = self.entries[shard], self._name(shard, number)
        start, end = entry.chunk(number)
        mend = "the manifest names it, so upload it again"
        for _ in range(0 if self._states[key] == _DAMAGED else 2):
            content = self.folder.read(entry.name, start, end, mend)
            if len(content) > end - start:
                raise DataError(
                    f"{self.where(shard)}: {self.folder.host} sends the whole file where a part "
                    "is asked for; serve the shards with a server that knows range requests "
                    "(nginx, Apache, any S3)"
                )
            if self._is_good(content, shard, number):
                self._states[key] = _GOOD
                self.cache.write(name, content)
                return self.cache.open(name, len(content)) or io.BytesIO(content)
        self._states[key] = _DAMAGED
        raise DamagedChunkError(f"bytes {start} to {end} are not those of the manifest")

    def _is_good(self, content: bytes, shard: int, number: int) -> bool:
        entry = self.entries[shard]
        start, end = entry.chunk(number)
        expected = int(entry.chunk_digests[number])
        return len(content) == end - start and first_bytes(hashlib.sha256(content)) == expected


def _without_sizes(manifest: Manifest) -> tuple[ShardEntry, ...]:
    """What reading needs, at most 16 bytes a sample."""
    nothing = np.empty((0, 2), np.int32)
    return tuple(replace(entry, sizes=nothing) for entry in manifest.shards)
