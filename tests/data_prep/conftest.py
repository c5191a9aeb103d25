"""Small data sets on disk: one that a test may spoil before it is read, and one in shards."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convnext_yolo.data_prep.formats import Category, DetectionDataset, ImageRecord, read_coco
from convnext_yolo.data_prep.manifest import Manifest
from convnext_yolo.data_prep.shard import shard_dataset

SIZES = [(48, 32), (32, 48), (40, 40), (64, 24), (33, 17)]  # width, height


@dataclass
class CocoFiles:
    """`document` is what `read` writes to `annotations` first."""

    folder: Path
    document: dict[str, Any]

    @property
    def annotations(self) -> Path:
        return self.folder / "instances.json"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def image(self, position: int) -> Path:
        return self.images / self.document["images"][position]["file_name"]

    def read(self) -> DetectionDataset:
        self.annotations.write_text(json.dumps(self.document))
        return read_coco(self.annotations, self.images)

    def shard(self, output: Path, **options: Any) -> Manifest:
        """Two samples to a shard, and quiet, unless told otherwise."""
        options = {"samples_per_shard": 2, "progress": False, **options}
        return shard_dataset(self.read(), output, **options)[0]


# Ids are sparse and in no order, as in COCO.
DOCUMENT: dict[str, Any] = {
    "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "dog"}],
    "images": [
        {"id": 70, "file_name": "a.jpg", "width": 48, "height": 32},
        {"id": 12, "file_name": "b.jpg", "width": 32, "height": 48},
        {"id": 500000000001, "file_name": "sub/c.png", "width": 40, "height": 40},
        {"id": 0, "file_name": "d.webp", "width": 64, "height": 24},
        {"id": 31, "file_name": "e.bmp", "width": 33, "height": 17},
    ],
    "annotations": [
        {"id": 1, "image_id": 70, "category_id": 9, "bbox": [1, 2, 30.5, 20.25], "area": 400.5},
        {"id": 2, "image_id": 12, "category_id": 3, "bbox": [0, 0, 32, 48], "iscrowd": 1},
        {"id": 3, "image_id": 70, "category_id": 3, "bbox": [10.1, 10.2, 5.3, 5.4], "iscrowd": 0},
        {"id": 4, "image_id": 500000000001, "category_id": 9, "bbox": [39, 39, 1, 1]},
        {"id": 5, "image_id": 31, "category_id": 9, "bbox": [3, 3, 4, 4]},
    ],
}


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def coco_files(tmp_path: Path) -> CocoFiles:
    files = CocoFiles(tmp_path / "data", copy.deepcopy(DOCUMENT))
    (files.images / "sub").mkdir(parents=True)
    for position, size in enumerate(SIZES):
        picture(size, position).save(files.image(position))
    return files


@pytest.fixture
def save_picture() -> Callable[..., None]:
    """Write a picture of noise: `save_picture(path, (width, height), format="GIF")`."""

    def save(path: Path, size: tuple[int, int], mode: str = "RGB", **options: Any) -> None:
        picture(size, 0).convert(mode).save(path, **options)

    return save


def noise(folder: Path, count: int) -> DetectionDataset:
    """Pictures of noise and many sizes; ids in steps of three; some boxes, some of them crowds."""
    rng = np.random.default_rng(1)
    records = []
    for i in range(count):
        width, height = (int(v) for v in rng.integers(20, 120, size=2))
        path = folder / f"{i}.png"
        picture((width, height), i).save(path)
        n = i % 4
        corners = np.sort(rng.uniform(0, 1, (n, 2, 2)), axis=1) * (width - 8, height - 8)
        boxes = np.concatenate((corners[:, 0], corners[:, 1] + 8), axis=1).astype(np.float32)
        records.append(
            ImageRecord(
                id=3 * i,
                file_name=path.name,
                path=path,
                width=width,
                height=height,
                boxes_xyxy=boxes,
                labels=np.arange(n) % 2,
                crowd=np.arange(n) == 2,
                area=np.full(n, 9, np.float32),
                annotation_ids=[100 * i + k for k in range(n)],
            )
        )
    return DetectionDataset((Category(1, "cat"), Category(5, "dog")), records)


@pytest.fixture(scope="session")
def noise_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """57 pictures in 6 shards. Not to be spoilt."""
    folder = tmp_path_factory.mktemp("noise")
    shard_dataset(noise(folder, 57), folder / "shards", samples_per_shard=10, progress=False)
    return folder / "shards"
