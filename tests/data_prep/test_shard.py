from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.findings import Findings
from convnext_yolo.data_prep.formats import DetectionDataset, ImageRecord, read_coco
from convnext_yolo.data_prep.manifest import Manifest
from convnext_yolo.data_prep.samples import encode_annotations
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.data_prep.verify import verify

# Two processes that import torch: seconds.
process = pytest.mark.process


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_shards_hold_the_original_bytes_and_the_annotations(coco_files, tmp_path):
    import webdataset

    dataset = coco_files.read()
    manifest = coco_files.shard(tmp_path / "out")
    assert [entry.name for entry in manifest.shards] == [f"shard-00000{i}.tar" for i in range(3)]
    assert [entry.samples for entry in manifest.shards] == [2, 2, 1]
    assert (manifest.samples, manifest.boxes, manifest.classes) == (5, 5, dataset.categories)

    urls = [str(tmp_path / "out" / entry.name) for entry in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    keys = list(itertools.chain.from_iterable(entry.keys for entry in manifest.shards))
    assert [sample["__key__"] for sample in samples] == keys
    for sample, image, extension in zip(
        samples, dataset.images, ["webp", "jpg", "bmp", "jpg", "png"], strict=True
    ):
        assert sample[extension] == image.path.read_bytes()
        document = json.loads(sample["json"])
        assert list(document) == [
            *["image_id", "file_name", "width", "height"],
            *["boxes", "labels", "crowd", "area", "annotation_ids"],
        ]
        assert document["image_id"] == image.id == int(sample["__key__"])
        assert document["file_name"] == image.file_name
        assert (document["width"], document["height"]) == (image.width, image.height)
        boxes = np.array(document["boxes"], np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(boxes, image.boxes_xyxy)
        assert document["labels"] == image.labels.tolist()
        assert document["crowd"] == image.crowd.tolist()
        assert document["annotation_ids"] == image.annotation_ids


def test_plain_webdataset_decodes_what_is_written(coco_files, tmp_path):
    import webdataset

    manifest = coco_files.shard(tmp_path / "out")
    urls = [str(tmp_path / "out" / entry.name) for entry in manifest.shards]
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(decoded) == 5
    for sample in decoded:
        image = next(v for v in sample.values() if isinstance(v, Image.Image))
        assert image.size == (sample["json"]["width"], sample["json"]["height"])


def test_an_offset_is_where_a_sample_begins(coco_files, tmp_path):
    from webdataset.tariterators import tar_file_iterator

    manifest = coco_files.shard(tmp_path / "out", samples_per_shard=3)
    for entry in manifest.shards:
        with (tmp_path / "out" / entry.name).open("rb") as file:
            for key, offset in zip(entry.keys, entry.offsets.tolist(), strict=True):
                file.seek(offset)
                first, second = itertools.islice(tar_file_iterator(file), 2)
                assert {first["fname"].split(".")[0], second["fname"].split(".")[0]} == {key}
                assert "json" in {first["fname"].split(".")[1], second["fname"].split(".")[1]}


def test_the_manifest_agrees_with_the_files(coco_files, tmp_path):
    manifest = coco_files.shard(tmp_path / "out")
    for entry in manifest.shards:
        data = (tmp_path / "out" / entry.name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert verify(tmp_path / "out", progress=False) == []
    loaded = Manifest.load(tmp_path / "out")
    assert [e.sizes.tolist() for e in loaded.shards] == [e.sizes.tolist() for e in manifest.shards]


def test_the_same_input_gives_the_same_bytes(coco_files, tmp_path):
    coco_files.shard(tmp_path / "one")
    for position in range(5):
        os.utime(coco_files.image(position), (1e9, 1e9))
    coco_files.document["images"].reverse()
    coco_files.shard(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@process
def test_workers_do_not_change_the_bytes_and_fail_with_the_sentence(coco_files, tmp_path):
    coco_files.shard(tmp_path / "one")
    coco_files.shard(tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    coco_files.image(2).write_bytes(b"GIF")
    with pytest.raises(DataError, match=r"c.png: is not an image"):
        coco_files.shard(tmp_path / "three", workers=2)
    assert not (tmp_path / "three").exists()


@process
def test_workers_do_not_change_what_is_refused(coco_files, tmp_path):
    """At the sizes that matter: several pieces of a shard, and several shards at once."""
    dataset = coco_files.read()
    coco_files.image(1).write_bytes(b"GIF")
    coco_files.image(3).unlink()
    images = [dataclasses.replace(dataset.images[i % 5], id=i) for i in range(300)]
    dataset = DetectionDataset(dataset.categories, images)
    for workers in (1, 2, 3):
        options = {"samples_per_shard": 70, "workers": workers, "progress": False}
        manifest, report = shard_dataset(dataset, tmp_path / str(workers), **options)
        assert [entry.samples for entry in manifest.shards] == [42, 42, 42, 42, 12]
        assert report.document["images"] == {"given": 300, "kept": 180}
        counts = {p["kind"]: p["count"] for p in report.document["problems"]}
        assert counts == {"image_missing": 60, "image_damaged": 60}
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "1")


def test_a_shard_whose_images_are_all_refused_is_not_written(coco_files, tmp_path):
    dataset = dataclasses.replace(coco_files.read(), findings=Findings())
    for record in dataset.images[2:4]:
        record.path.write_bytes(b"")
    manifest, report = shard_dataset(dataset, tmp_path / "out", 2, progress=False)
    assert [entry.name for entry in manifest.shards] == ["shard-000000.tar", "shard-000002.tar"]
    assert verify(tmp_path / "out", progress=False) == []
    assert shard_dataset(dataset, tmp_path / "out", 2, progress=False)[1] == report  # as it is

    for record in dataset.images:
        record.path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 5 images can be used; the first: .*is empty"):
        shard_dataset(dataset, tmp_path / "new" / "out", progress=False)
    assert not (tmp_path / "new").exists()


def test_strict_does_not_take_an_output_with_refused_images(coco_files, tmp_path):
    dataset = dataclasses.replace(coco_files.read(), findings=Findings())
    dataset.images[0].path.write_bytes(b"")
    shard_dataset(dataset, tmp_path / "out", progress=False)
    strict = dataclasses.replace(dataset, findings=Findings(strict=True))
    with pytest.raises(DataError, match="the image file is empty"):
        shard_dataset(strict, tmp_path / "out", progress=False)


def test_the_bytes_are_those_of_webdatasets_own_writer(coco_files, tmp_path):
    from webdataset.writer import TarWriter

    dataset = coco_files.read()
    coco_files.shard(tmp_path / "out", samples_per_shard=5)
    with TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=0, mode=0o444) as tar:
        for record in dataset.images:
            suffix = record.path.suffix[1:]
            sample = {suffix: record.path.read_bytes(), "json": encode_annotations(record)}
            tar.write({"__key__": f"{record.id:012d}", **sample})
    ours = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    assert ours == (tmp_path / "theirs.tar").read_bytes()


finite = st.floats(0, 2**20, width=32)


@settings(deadline=None, derandomize=True)
@given(
    boxes=hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.just(4)), elements=finite),
    image_id=st.integers(0, 2**63 - 1),
    file_name=st.text(min_size=1),
)
def test_annotations_survive_the_round_trip(boxes, image_id, file_name):
    count = len(boxes)
    record = ImageRecord(
        id=image_id,
        file_name=file_name,
        path=Path(),
        width=7,
        height=9,
        boxes_xyxy=boxes,
        labels=np.arange(count),
        crowd=np.arange(count) % 2 == 1,
        area=boxes[:, 0],
        annotation_ids=list(range(count)),
    )
    document = json.loads(encode_annotations(record))
    assert (document["image_id"], document["file_name"]) == (image_id, file_name)
    np.testing.assert_array_equal(np.array(document["boxes"], np.float32).reshape(-1, 4), boxes)
    np.testing.assert_array_equal(np.array(document["area"], np.float32), record.area)
    assert document["labels"] == list(range(count))
    assert document["crowd"] == record.crowd.tolist()


@pytest.mark.parametrize("name", ["bccd", "coco_mini"])
def test_bundled_data(datasets, tmp_path, name):
    dataset = read_coco(datasets / name / "instances_val.json", datasets / name / "images" / "val")
    shard_dataset(dataset, tmp_path / "out", samples_per_shard=50, progress=False)
    assert verify(tmp_path / "out", progress=False) == []
