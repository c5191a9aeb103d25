"""Random access to samples: of shards, or of files."""

import io
import itertools
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .cache import CacheOptions
from .decode import decode_image
from .errors import CorruptSampleError
from .formats import Category, DetectionDataset
from .samples import sample_key
from .source import load_manifest, open_source


@dataclass(frozen=True)
class Sample:
    """One decoded picture with its boxes. N boxes."""

    image: np.ndarray  # [H, W, 3] uint8, RGB
    boxes_xyxy: np.ndarray  # [N, 4] float32, pixels
    labels: np.ndarray  # [N] int64, class index
    crowd: np.ndarray  # [N] bool: a box round many objects
    area: np.ndarray  # [N] float32, pixels², of the object where the annotation knows it
    image_id: int


class SampleReader(Protocol):
    """Where samples come from: shards for training, shards or files for evaluation."""

    classes: tuple[Category, ...]

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def decode(self, position: int) -> Sample:
        """One sample, its picture decoded. Raises CorruptSampleError where that can't be."""
        ...

    def sizes_px(self) -> np.ndarray:
        """Width and height of every picture, `[n, 2]`, as annotated; nothing is decoded."""
        ...


def own_members(content: bytes, key: str) -> tuple[bytes, bytes] | None:
    """Picture and JSON of a sample as our writer lays them down, two plain members side by side.

    None for any other tar, or a damaged one. Reading a sample takes half as long this way as
    through a tar stream, which is a twentieth of all that a loader's worker does.
    """
    parts: dict[str, bytes] = {}
    start = 0
    for _ in range(2):
        try:
            header = tarfile.TarInfo.frombuf(content[start : start + 512], "utf-8", "strict")
        except (tarfile.TarError, ValueError):
            return None
        name, _, extension = header.name.partition(".")
        start, end = start + 512, start + 512 + header.size
        if not header.isreg() or name != key or end > len(content):
            return None
        parts[extension] = content[start:end]
        start += -(-header.size // 512) * 512
    annotations = parts.pop("json", None)
    if annotations is None or len(parts) != 1:
        return None
    return next(iter(parts.values())), annotations


def any_members(content: bytes, key: str) -> tuple[bytes, bytes]:
    """Picture and JSON of a sample in any tar that webdataset reads: long names, other orders.

    Raises:
        ValueError: no tar, or one that is cut short, or other members.
    """
    from webdataset.tariterators import base_plus_ext, tar_file_iterator

    try:
        members = list(itertools.islice(tar_file_iterator(io.BytesIO(content)), 2))
    except (tarfile.TarError, OSError) as error:
        why = str(error).partition(" @ ")[0]  # webdataset adds the file object
        raise ValueError(f"can't be read, {why}") from None
    names = [base_plus_ext(member["fname"]) for member in members]
    parts = {name[1]: member["data"] for name, member in zip(names, members, strict=True)}
    if {name[0] for name in names} != {key} or len(parts) != 2 or "json" not in parts:
        found = ", ".join(member["fname"] for member in members) or "nothing"
        raise ValueError(f"should be a picture and a json, but {found} is there")
    annotations = parts.pop("json")
    return next(iter(parts.values())), annotations


class ShardReader:
    """Reads single samples by their position in the manifest.

    A reader is cheap to make and to pickle: files are opened and hosts connected at first use, in
    the process that uses them. A copy that was pickled can read, but lacks `manifest`.

    Args:
        location: a folder of shards, or its URL (http, https, s3, gs).
        cache: for a URL: where to keep what is fetched, and how long to wait for the host.

    Raises:
        DataError: no such folder, host or access, or a damaged manifest.
    """

    def __init__(self, location: Path | str, cache: CacheOptions | None = None):
        cache = cache or CacheOptions()
        self.manifest = load_manifest(location, cache.patience_s)
        self.source = open_source(location, self.manifest, cache)
        self.classes = self.manifest.classes
        self._ends = np.cumsum([entry.samples for entry in self.source.entries])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "manifest"}

    def read(self, position: int) -> tuple[bytes, dict[str, Any]]:
        """The encoded picture and the annotations of one sample.

        Raises:
            CorruptSampleError: the sample is not what the manifest says.
            DataError: the shard is missing, or its host stays away.
        """
        shard, within = self._place(position)
        entry = self.source.entries[shard]
        key = sample_key(int(entry.image_ids[within]))
        try:
            file, offset = self.source.open_at(shard, within)
            file.seek(offset)
            content = file.read(entry.length(within))
        except OSError as error:
            raise self._corrupt(position, f"can't be read, {error}") from None
        try:
            picture, annotations = own_members(content, key) or any_members(content, key)
        except ValueError as error:
            raise self._corrupt(position, str(error)) from None
        try:
            return picture, json.loads(annotations)
        except (ValueError, RecursionError) as error:
            raise self._corrupt(position, f"has broken JSON, {error}") from None

    def decode(self, position: int, out: np.ndarray | None = None) -> Sample:
        """One sample with its picture decoded.

        Args:
            position: in the manifest.
            out: bytes that the pixels may be written to, see `decode_image`.

        Raises:
            CorruptSampleError: the sample can't be read or decoded.
        """
        encoded, annotations = self.read(position)
        try:
            sample = Sample(
                image=decode_image(encoded, out),
                boxes_xyxy=np.array(annotations["boxes"], np.float32).reshape(-1, 4),
                labels=np.array(annotations["labels"], np.int64),
                crowd=np.array(annotations["crowd"], bool),
                area=np.array(annotations["area"], np.float32),
                image_id=annotations["image_id"],
            )
            self._check(sample, (annotations["height"], annotations["width"]))
        except KeyError as error:
            raise self._corrupt(position, f"lacks {error} in its JSON") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise self._corrupt(position, str(error)) from None
        return sample

    def _check(self, sample: Sample, size: tuple[int, int]) -> None:
        """Raises ValueError where well-formed JSON says what can't be; `verify` looks closer."""
        count = len(sample.labels)
        if any(len(column) != count for column in (sample.boxes_xyxy, sample.crowd, sample.area)):
            raise ValueError("has boxes, labels, crowd and area of different lengths")
        if count and not 0 <= sample.labels.min() <= sample.labels.max() < len(self.classes):
            raise ValueError(f"has labels outside the {len(self.classes)} classes")
        if not np.isfinite(sample.boxes_xyxy).all():
            raise ValueError("has boxes that are not finite")
        if sample.image.shape[:2] != size:
            raise ValueError(f"has a picture of {sample.image.shape[:2]} px, annotated as {size}")

    def sizes_px(self) -> np.ndarray:
        """Width and height of every picture, `[n, 2]`, from the manifest (no pickled copy's)."""
        return np.concatenate([shard.sizes for shard in self.manifest.shards])

    def _place(self, position: int) -> tuple[int, int]:
        """The shard of a sample, and its number there."""
        index = int(np.searchsorted(self._ends, position, side="right"))
        return index, position - (int(self._ends[index - 1]) if index else 0)

    def _corrupt(self, position: int, reason: str) -> CorruptSampleError:
        shard, within = self._place(position)
        key = sample_key(int(self.source.entries[shard].image_ids[within]))
        return CorruptSampleError(self.source.where(shard), key, reason)


class FileReader:
    """Reads the samples of a data set that was not sharded: a COCO JSON and its images."""

    def __init__(self, dataset: DetectionDataset):
        self.dataset, self.classes = dataset, dataset.categories

    def __len__(self) -> int:
        return len(self.dataset.images)

    def decode(self, position: int) -> Sample:
        """One sample. Raises CorruptSampleError where its file can't be read or decoded."""
        record = self.dataset.images[position]
        try:
            image = decode_image(record.path.read_bytes())
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise CorruptSampleError(str(record.path), sample_key(record.id), reason) from None
        return Sample(
            image=image,
            boxes_xyxy=record.boxes_xyxy,
            labels=record.labels,
            crowd=record.crowd,
            area=record.area,
            image_id=record.id,
        )

    def sizes_px(self) -> np.ndarray:
        """Width and height of every picture, `[n, 2]`, from the annotations."""
        sizes = [(record.width, record.height) for record in self.dataset.images]
        return np.array(sizes, dtype=np.int32).reshape(-1, 2)
