"""`manifest.json`: what a folder of shards holds, and the proof that it still does.

Legend: n samples of one shard (`samples` says what a sample is). An offset is the byte at which
the tar header of a sample's first member begins: an open file put there is a tar stream that
begins with that sample. A chunk is a run of `CHUNK` samples, from the offset of its first one to
that of the next chunk's or to the end of the shard: what is fetched and cached as a whole where
shards lie far away, hence its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .records import Category
from .samples import sample_key

MANIFEST_NAME = "manifest.json"
FORMAT = "convnext-yolo-shards"
VERSION = 2
CHUNK = 8  # samples
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar")  # a plain name: no way out
TAR_BLOCK_BYTES = 512
_Bytes = bytes  # within `Manifest`, `bytes` is its size


@dataclass(frozen=True, eq=False)
class ShardEntry:
    """One tar. Arrays, not lists: 118,287 samples take 2 MB in all."""

    name: str
    bytes: int
    sha256: str
    image_ids: np.ndarray  # [n], of the smallest unsigned type that holds them
    blocks: np.ndarray  # [n] uint32, offsets in tar blocks of 512 bytes
    sizes: np.ndarray  # [n, 2] int32, width and height in pixels
    chunk_digests: np.ndarray  # [ceil(n / CHUNK)] uint64, first 8 bytes of sha256

    @property
    def samples(self) -> int:
        """How many samples the shard holds."""
        return len(self.image_ids)

    @property
    def offsets(self) -> np.ndarray:
        """Where the samples begin, `[n]` int64, bytes."""
        return self.blocks.astype(np.int64) * TAR_BLOCK_BYTES

    def chunk(self, number: int) -> tuple[int, int]:
        """The bytes of a chunk, from and to."""
        start, end = number * CHUNK, (number + 1) * CHUNK
        last = self.bytes if end >= self.samples else int(self.blocks[end]) * TAR_BLOCK_BYTES
        return int(self.blocks[start]) * TAR_BLOCK_BYTES, last

    def length(self, within: int) -> int:
        """How many bytes a sample takes, up to the next one or to the end of the shard."""
        last = within + 1 == self.samples
        end = self.bytes if last else int(self.blocks[within + 1]) * TAR_BLOCK_BYTES
        return end - int(self.blocks[within]) * TAR_BLOCK_BYTES

    @property
    def keys(self) -> list[str]:
        """The samples' keys, made anew at each call: as strings they would take 70 bytes each."""
        return [sample_key(image_id) for image_id in self.image_ids.tolist()]


@dataclass(frozen=True, eq=False)
class Manifest:
    """The contents of a shard folder, in the order of its samples."""

    classes: tuple[Category, ...]
    boxes: int
    fingerprint: str  # sha256 over input and settings: equal ones give equal shards
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        """How many samples all shards hold."""
        return sum(entry.samples for entry in self.shards)

    @property
    def bytes(self) -> int:
        """The size of all shards."""
        return sum(entry.bytes for entry in self.shards)

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read the manifest of a shard folder on disk (`source.load_manifest`: at a URL too).

        The shards themselves are not looked at.

        Raises:
            DataError: no such folder, no manifest in it, or one that is damaged or of another
                version.
        """
        path = Path(folder) / MANIFEST_NAME
        if not path.parent.is_dir():
            raise DataError(
                f"{folder}: no such shard folder; make it with `convnext-yolo shard --output`."
            )
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            what = "the folder is empty" if not any(path.parent.iterdir()) else "not a shard folder"
            raise DataError(
                f"{folder}: {what}, it has no {MANIFEST_NAME}; "
                "make the shards with `convnext-yolo shard --output`."
            ) from None
        except OSError as error:
            raise DataError(f"{path}: can't be read: {error.strerror}.") from None
        return Manifest.parse(content, str(path))

    @staticmethod
    def parse(content: _Bytes, where: str) -> Manifest:
        """Read the bytes of a manifest that came from `where`.

        Raises:
            DataError: it is damaged or of another version.
        """
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _damaged(where, f"not valid JSON ({error})") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise DataError(
                f"{where}: the format is not {FORMAT!r}; give a folder that "
                "`convnext-yolo shard` made."
            )
        if document.get("version") != VERSION:
            raise DataError(
                f"{where}: version is {document.get('version')!r}, this program reads {VERSION}; "
                "update the program or make the shards again."
            )
        try:
            return _from_document(document)
        except KeyError as error:
            raise _damaged(where, f"{error.args[0]} is missing") from None
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise _damaged(where, str(error)) from None

    def save(self, folder: Path) -> None:
        """Write `manifest.json`, whole or not at all; the same manifest gives the same bytes."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "classes": [{"id": c.id, "name": c.name} for c in self.classes],
            "samples": self.samples,
            "boxes": self.boxes,
            "bytes": self.bytes,
            "fingerprint": self.fingerprint,
        }
        shards = ",\n".join(json.dumps(shard_document(entry)) for entry in self.shards)
        text = json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{shards}\n]\n}}\n'
        path = Path(folder) / MANIFEST_NAME
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def missing(self, folder: Path) -> list[str]:
        """One sentence per shard that is absent or has another size: a look, not a read."""
        problems = []
        for entry in self.shards:
            path = Path(folder) / entry.name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                problems.append(f"{path}: the shard is missing; fetch or make it again.")
            elif size != entry.bytes:
                problems.append(
                    f"{path}: has {size} bytes, the manifest says {entry.bytes}; "
                    "fetch or make the shard again."
                )
        return problems


def _damaged(where: str, what: str) -> DataError:
    return DataError(f"{where}: the manifest is damaged, {what}; fetch or make the shards again.")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _from_document(document: dict[str, Any]) -> Manifest:
    classes = tuple(Category(int(c["id"]), str(c["name"])) for c in document["classes"])
    _require(len(classes) > 0, "classes is empty")
    shards = tuple(shard_entry(shard) for shard in document["shards"])
    _require(len({entry.name for entry in shards}) == len(shards), "a shard is listed twice")
    manifest = Manifest(classes, int(document["boxes"]), str(document["fingerprint"]), shards)
    for key in ("samples", "bytes"):
        total = getattr(manifest, key)
        _require(document[key] == total, f"{key} is {document[key]} but its shards hold {total}")
    _require(manifest.samples > 0, "it lists no samples")
    return manifest


def shard_entry(shard: dict[str, Any]) -> ShardEntry:
    """A shard's entry from its part of the manifest; KeyError, TypeError or ValueError if bad."""
    name = shard["name"]
    _require(bool(_SHARD_NAME.fullmatch(name)), f"{name!r} is not a shard's name")
    keys = shard["keys"]
    offsets = np.array(shard["offsets"], dtype=np.int64)
    ends = np.append(offsets, int(shard["bytes"]))
    good = bool((ends[1:] > ends[:-1]).all()) and not (offsets % TAR_BLOCK_BYTES).any()
    _require(good and bool((offsets >= 0).all()), f"{name} has bad offsets")
    entry = ShardEntry(
        name=name,
        bytes=int(shard["bytes"]),
        sha256=str(shard["sha256"]),
        image_ids=narrow(np.array([int(key) for key in keys], dtype=np.int64)),
        blocks=(offsets // TAR_BLOCK_BYTES).astype(np.uint32),
        sizes=np.array(shard["sizes"], dtype=np.int32).reshape(-1, 2),
        chunk_digests=np.array([int(digest, 16) for digest in shard["chunks"]], dtype=np.uint64),
    )
    _require(entry.keys == keys, f"{name} has keys that are not image ids in 12 digits")
    _require(
        len(keys) == shard["samples"] == len(offsets) == len(entry.sizes),
        f"{name} has {shard['samples']} samples, {len(keys)} keys, {len(offsets)} offsets "
        f"and {len(entry.sizes)} sizes",
    )
    chunks = -(-len(keys) // CHUNK)
    _require(
        len(entry.chunk_digests) == chunks,
        f"{name} has {len(entry.chunk_digests)} chunks for {chunks} x {CHUNK} samples",
    )
    _require(bool((entry.sizes > 0).all()), f"{name} has image sizes below 1")
    return entry


def narrow(image_ids: np.ndarray) -> np.ndarray:
    """The same ids in the smallest unsigned type that holds them: 4 bytes each in COCO."""
    return image_ids.astype(np.min_scalar_type(int(image_ids.max(initial=0))))


def first_bytes(digest: hashlib._Hash) -> int:
    """What the manifest keeps of a chunk's sha256: its first 8 bytes."""
    return int.from_bytes(digest.digest()[:8], "big")


def shard_document(entry: ShardEntry) -> dict[str, Any]:
    """A shard's part of the manifest."""
    return {
        "name": entry.name,
        "samples": entry.samples,
        "bytes": entry.bytes,
        "sha256": entry.sha256,
        "keys": entry.keys,
        "offsets": entry.offsets.tolist(),
        "sizes": entry.sizes.tolist(),
        "chunks": [f"{digest:016x}" for digest in entry.chunk_digests.tolist()],
    }
