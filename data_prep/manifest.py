"""`manifest.json`: what a folder of shards holds, and the proof that it still does.

Legend: n samples of one shard (`samples` says what a sample is). An offset is the byte at which
the tar header of a sample's first member begins: an open file put there is a tar stream that
begins with that sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .formats import Category
from .samples import check_sample, read_samples, sample_key

MANIFEST_NAME = "manifest.json"
FORMAT = "convnext-yolo-shards"
VERSION = 1
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar")  # a plain name: no way out
_TAR_BLOCK_BYTES = 512
_PROBLEMS_PER_SHARD = 5  # one shifted byte makes every sample of a shard wrong


@dataclass(frozen=True, eq=False)
class ShardEntry:
    """One tar. Arrays, not lists: 118,287 samples take 3 MB in all."""

    name: str
    bytes: int
    sha256: str
    image_ids: np.ndarray  # [n] int64
    offsets: np.ndarray  # [n] uint64, bytes
    sizes: np.ndarray  # [n, 2] int32, width and height in pixels

    @property
    def samples(self) -> int:
        """How many samples the shard holds."""
        return len(self.image_ids)

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
        """Read the manifest of a shard folder. The shards themselves are not looked at.

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
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            what = "the folder is empty" if not any(path.parent.iterdir()) else "not a shard folder"
            raise DataError(
                f"{folder}: {what}, it has no {MANIFEST_NAME}; "
                "make the shards with `convnext-yolo shard --output`."
            ) from None
        except OSError as error:
            raise DataError(f"{path}: can't be read: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"not valid JSON ({error})") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise DataError(
                f"{path}: the format is not {FORMAT!r}; give a folder that "
                "`convnext-yolo shard` made."
            )
        if document.get("version") != VERSION:
            raise DataError(
                f"{path}: version is {document.get('version')!r}, this program reads {VERSION}; "
                "update the program or make the shards again."
            )
        try:
            return _from_document(document)
        except KeyError as error:
            raise _damaged(path, f"{error.args[0]} is missing") from None
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise _damaged(path, str(error)) from None

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
        shards = ",\n".join(json.dumps(_shard_document(entry)) for entry in self.shards)
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


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: the manifest is damaged, {what}; fetch or make the shards again.")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _from_document(document: dict[str, Any]) -> Manifest:
    classes = tuple(Category(int(c["id"]), str(c["name"])) for c in document["classes"])
    _require(len(classes) > 0, "classes is empty")
    shards = tuple(_shard_entry(shard) for shard in document["shards"])
    _require(len({entry.name for entry in shards}) == len(shards), "a shard is listed twice")
    manifest = Manifest(classes, int(document["boxes"]), str(document["fingerprint"]), shards)
    for key in ("samples", "bytes"):
        total = getattr(manifest, key)
        _require(document[key] == total, f"{key} is {document[key]} but its shards hold {total}")
    _require(manifest.samples > 0, "it lists no samples")
    return manifest


def _shard_entry(shard: dict[str, Any]) -> ShardEntry:
    name = shard["name"]
    _require(bool(_SHARD_NAME.fullmatch(name)), f"{name!r} is not a shard's name")
    keys = shard["keys"]
    image_ids = np.array([int(key) for key in keys], dtype=np.int64)
    entry = ShardEntry(
        name=name,
        bytes=int(shard["bytes"]),
        sha256=str(shard["sha256"]),
        image_ids=image_ids,
        offsets=np.array(shard["offsets"], dtype=np.uint64),
        sizes=np.array(shard["sizes"], dtype=np.int32).reshape(-1, 2),
    )
    _require(entry.keys == keys, f"{name} has keys that are not image ids in 12 digits")
    _require(
        len(keys) == shard["samples"] == len(entry.offsets) == len(entry.sizes),
        f"{name} has {shard['samples']} samples, {len(keys)} keys, {len(entry.offsets)} offsets "
        f"and {len(entry.sizes)} sizes",
    )
    ends = np.append(entry.offsets, np.uint64(entry.bytes))
    rising = bool((ends[1:] > ends[:-1]).all())
    _require(rising and not (entry.offsets % _TAR_BLOCK_BYTES).any(), f"{name} has bad offsets")
    _require(bool((entry.sizes > 0).all()), f"{name} has image sizes below 1")
    return entry


def _shard_document(entry: ShardEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "samples": entry.samples,
        "bytes": entry.bytes,
        "sha256": entry.sha256,
        "keys": entry.keys,
        "offsets": entry.offsets.tolist(),
        "sizes": entry.sizes.tolist(),
    }


def verify(folder: Path, progress: bool = True) -> list[str]:
    """Hash and read every shard again and compare with the manifest.

    Returns:
        One sentence per problem; empty if all is well.

    Raises:
        DataError: there is no manifest to compare with (see `Manifest.load`).
    """
    from tqdm import tqdm

    folder = Path(folder)
    manifest = Manifest.load(folder)
    names = {entry.name for entry in manifest.shards}
    problems = [
        f"{path}: the manifest doesn't list this shard; remove it or make the shards again."
        for path in sorted(folder.glob("*.tar"))
        if path.name not in names
    ]
    ids = np.concatenate([entry.image_ids for entry in manifest.shards])
    if len(np.unique(ids)) != len(ids):
        problems.append(f"{folder}: an image is in two samples; make the shards again.")
    boxes = 0
    bar = tqdm(total=manifest.bytes, unit="B", unit_scale=True, delay=1, disable=not progress)
    with bar:
        for entry in manifest.shards:
            found, boxes_read = _verify_shard(folder / entry.name, entry, len(manifest.classes))
            more = len(found) - _PROBLEMS_PER_SHARD
            problems += found[:_PROBLEMS_PER_SHARD]
            if more > 0:
                problems.append(f"{folder / entry.name}: {more} more problems like these.")
            boxes += boxes_read
            bar.update(entry.bytes)
    if not problems and boxes != manifest.boxes:
        problems.append(
            f"{folder / MANIFEST_NAME}: boxes is {manifest.boxes} but the shards hold {boxes}; "
            "make the shards again."
        )
    return problems


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verify_shard(path: Path, entry: ShardEntry, class_count: int) -> tuple[list[str], int]:
    """All that is wrong with one shard, and how many boxes it holds."""
    again = "fetch or make the shard again"
    try:
        size, digest = path.stat().st_size, _sha256(path)
    except FileNotFoundError:
        return [f"{path}: the shard is missing; {again}."], 0
    except OSError as error:
        return [f"{path}: can't be read ({error.strerror}); make it readable."], 0
    problems = []
    if size != entry.bytes:
        problems.append(f"{path}: has {size} bytes, the manifest says {entry.bytes}; {again}.")
    if digest != entry.sha256:
        problems.append(
            f"{path}: sha256 is {digest[:12]}…, the manifest says {entry.sha256[:12]}…; {again}."
        )
    expected = zip(entry.keys, entry.offsets.tolist(), entry.sizes.tolist(), strict=True)
    count = boxes = 0
    try:
        for key, offset, members in read_samples(path):
            count += 1
            key_listed, offset_listed, (width, height) = next(expected, ("", 0, (0, 0)))
            if (key, offset) != (key_listed, offset_listed):
                listed = f"{key_listed} at {offset_listed}" if key_listed else "nothing more"
                problems.append(
                    f"{path}: holds {key} at byte {offset}, the manifest says {listed}; {again}."
                )
                continue
            problem, boxes_here = check_sample(members, int(key), (width, height), class_count)
            if problem:
                problems.append(f"{path}: sample {key} {problem}; {again}.")
            boxes += boxes_here
    except (tarfile.TarError, OSError, ValueError) as error:
        problems.append(f"{path}: the tar is broken after {count} samples ({error}); {again}.")
    if count != entry.samples:
        problems.append(
            f"{path}: {count} samples can be read, the manifest says {entry.samples}; {again}."
        )
    return problems, boxes
