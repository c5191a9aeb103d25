"""Random access to samples: of a shard folder through webdataset's tar reader, or of files."""

import itertools
import json
import os
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from .decode import decode_image
from .errors import CorruptSampleError, DataError
from .formats import Category, DetectionDataset
from .manifest import TAR_BLOCK_BYTES, Manifest
from .samples import sample_key

MAX_OPEN_SHARDS = 32


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


class ShardReader:
    """Reads single samples by their position in the manifest.

    A reader is cheap to make and to pickle: files are opened at first use, in the process that
    uses them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self.classes = self.manifest.classes
        counts = [shard.samples for shard in self.manifest.shards]
        self._ends = np.cumsum(counts)
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._owner = os.getpid()  # of the open files

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, position: int) -> tuple[bytes, dict[str, Any]]:
        """The encoded picture and the annotations of one sample.

        Raises:
            CorruptSampleError: the sample is not what the manifest says.
            DataError: the shard is missing.
        """
        # Heavy (it imports torch), and `--help` must not wait for it.
        from webdataset.tariterators import base_plus_ext, tar_file_iterator

        index, within = self._place(position)
        offset = int(self.manifest.shards[index].blocks[within]) * TAR_BLOCK_BYTES
        key = self._key(position)
        file = self._file(index)
        try:
            file.seek(offset)
            # A sample is two members: the picture and its JSON.
            members = list(itertools.islice(tar_file_iterator(file), 2))
        except (tarfile.TarError, OSError) as error:
            why = str(error).partition(" @ ")[0]  # webdataset adds the file object
            raise self._corrupt(position, f"can't be read, {why}") from None
        names = [base_plus_ext(member["fname"]) for member in members]
        parts = {name[1]: member["data"] for name, member in zip(names, members, strict=True)}
        if {name[0] for name in names} != {key} or len(parts) != 2 or "json" not in parts:
            found = ", ".join(member["fname"] for member in members) or "nothing"
            raise self._corrupt(position, f"should be a picture and a json, but {found} is there")
        try:
            annotations = json.loads(parts.pop("json"))
        except ValueError as error:
            raise self._corrupt(position, f"has broken JSON, {error}") from None
        return next(iter(parts.values())), annotations

    def decode(self, position: int) -> Sample:
        """One sample with its picture decoded.

        Raises:
            CorruptSampleError: the sample can't be read or decoded.
        """
        encoded, annotations = self.read(position)
        try:
            return Sample(
                image=decode_image(encoded),
                boxes_xyxy=np.array(annotations["boxes"], np.float32).reshape(-1, 4),
                labels=np.array(annotations["labels"], np.int64),
                crowd=np.array(annotations["crowd"], bool),
                area=np.array(annotations["area"], np.float32),
                image_id=annotations["image_id"],
            )
        except KeyError as error:
            raise self._corrupt(position, f"lacks {error} in its JSON") from None
        except (TypeError, ValueError) as error:
            raise self._corrupt(position, str(error)) from None

    def sizes_px(self) -> np.ndarray:
        """Width and height of every picture, `[n, 2]`, from the manifest."""
        return np.concatenate([shard.sizes for shard in self.manifest.shards])

    def _place(self, position: int) -> tuple[int, int]:
        """The shard of a sample, and its number there."""
        index = int(np.searchsorted(self._ends, position, side="right"))
        return index, position - (int(self._ends[index - 1]) if index else 0)

    def _key(self, position: int) -> str:
        index, within = self._place(position)
        return sample_key(int(self.manifest.shards[index].image_ids[within]))

    def _corrupt(self, position: int, reason: str) -> CorruptSampleError:
        path = self.folder / self.manifest.shards[self._place(position)[0]].name
        return CorruptSampleError(str(path), self._key(position), reason)

    def _file(self, index: int) -> IO[bytes]:
        if self._owner != os.getpid():  # forked: an inherited file would be read by two
            self._open, self._owner = OrderedDict(), os.getpid()
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        path = self.folder / self.manifest.shards[index].name
        try:
            file = open(path, "rb")  # noqa: SIM115 - kept open over many reads
        except OSError as error:
            raise DataError(
                f"shard {path}: {error.strerror}; the manifest names it, so shard the data again"
            ) from error
        self._open[index] = file
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return file


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
