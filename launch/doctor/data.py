"""Shards as they can be read from this host: the manifest, all sizes, a few samples in full.

What is read of a few is compared with the manifest's digests, and its own digest travels back: two
hosts whose manifests are equal may still hold other bytes.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .facts import CacheFolder, Shards
from .folders import existing, free_bytes, unwritable

CHUNKS = 6  # that are read in full, from as many shards as there are


def shards(location: str, cache: Mapping[str, Any]) -> Shards:
    """Reads a folder or URL of shards.

    Args:
        location: of the shards.
        cache: the recipe's `data` section, for URLs.
    """
    from ...data_prep.cache import CacheOptions
    from ...data_prep.errors import CorruptSampleError, DataError
    from ...data_prep.manifest import CHUNK
    from ...data_prep.reader import ShardReader
    from ...data_prep.remote import is_url

    found = Shards(location=location)
    options = CacheOptions(cache["cache"], cache["cache_gib"], cache["patience_s"])
    try:
        reader = ShardReader(location, options)
        manifest = reader.manifest
        found.fingerprint, found.samples = manifest.fingerprint, manifest.samples
        found.shards, found.bytes = len(manifest.shards), manifest.bytes
        found.classes = [f"{category.id} {category.name}" for category in manifest.classes]
        if not is_url(location):
            found.missing = manifest.missing(Path(location))
        if found.missing:
            return found
        digest = hashlib.sha256()
        for shard, chunk in some_chunks([len(entry.chunk_digests) for entry in manifest.shards]):
            first = sum(entry.samples for entry in manifest.shards[:shard]) + chunk * CHUNK
            try:
                picture, _ = reader.read(first)
                reader.decode(first)
                digest.update(picture)
                _check_chunk(reader, shard, chunk, is_url(location))
            except CorruptSampleError as error:
                found.damaged.append(str(error))
        found.read = digest.hexdigest()
    except DataError as error:
        found.error = str(error)
    return found


def cache_folder(data: Mapping[str, Any]) -> CacheFolder | None:
    """Where chunks of shards are kept; None where no shards lie at a URL.

    Args:
        data: the recipe's section.
    """
    from ...data_prep.cache import used_bytes
    from ...data_prep.remote import is_url

    if not any(is_url(data[split]) for split in ("train", "val")):
        return None
    folder = Path(data["cache"]).expanduser()
    place = existing(folder / "chunks")
    return CacheFolder(
        place=str(place),
        error=unwritable(place),
        free_bytes=free_bytes(place),
        used_bytes=used_bytes(folder),
    )


def some_chunks(chunks: list[int]) -> list[tuple[int, int]]:
    """A few places over all shards, the first and the last shard among them.

    Args:
        chunks: how many each shard has.

    Returns:
        Shard and chunk, the same on every host.
    """
    count = min(CHUNKS, len(chunks))
    numbers = sorted({round(i * (len(chunks) - 1) / max(1, count - 1)) for i in range(count)})
    if len(numbers) == 1:  # one shard: its beginning, and its end
        return [(0, chunk) for chunk in sorted({0, chunks[0] - 1})]
    return [(n, i * (chunks[n] - 1) // (len(numbers) - 1)) for i, n in enumerate(numbers)]


def _check_chunk(reader: Any, shard: int, chunk: int, is_far: bool) -> None:
    """Raises CorruptSampleError where a chunk's bytes are not the manifest's."""
    from ...data_prep.errors import CorruptSampleError
    from ...data_prep.manifest import CHUNK, first_bytes

    if is_far:  # it is checked whenever it is fetched
        return
    entry = reader.manifest.shards[shard]
    start, end = entry.chunk(chunk)
    file, _ = reader.source.open_at(shard, chunk * CHUNK)
    file.seek(start)
    found = first_bytes(hashlib.sha256(file.read(end - start)))
    if found != int(entry.chunk_digests[chunk]):
        raise CorruptSampleError(
            reader.source.where(shard), entry.keys[chunk * CHUNK], "has other bytes than its digest"
        )
