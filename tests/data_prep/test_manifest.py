from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.formats import Category
from convnext_yolo.data_prep.manifest import CHUNK, Manifest, ShardEntry, narrow
from convnext_yolo.data_prep.shard import shard_dataset

from .conftest import noise

Document = dict[str, Any]


@pytest.fixture
def shards(coco_files, tmp_path) -> Path:
    shard_dataset(coco_files.read(), tmp_path / "shards", samples_per_shard=2, progress=False)
    return tmp_path / "shards"


def manifest_of(images: int, samples_per_shard: int) -> Manifest:
    """A manifest of no files."""
    entries = []
    for index, start in enumerate(range(0, images, samples_per_shard)):
        count = min(samples_per_shard, images - start)
        entries.append(
            ShardEntry(
                name=f"shard-{index:06d}.tar",
                bytes=count * 160_000,
                sha256="0" * 64,
                image_ids=narrow(np.arange(start, start + count) * 5),
                blocks=np.arange(count, dtype=np.uint32) * np.uint32(312),
                sizes=np.tile(np.array([640, 480], np.int32), (count, 1)),
                chunk_digests=np.arange(-(-count // CHUNK), dtype=np.uint64),
            )
        )
    return Manifest((Category(1, "cat"),), 7 * images, "f" * 64, tuple(entries))


def test_save_and_load(tmp_path):
    manifest = manifest_of(10, 4)
    manifest.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    loaded = Manifest.load(tmp_path)
    assert (loaded.samples, loaded.boxes, loaded.bytes) == (10, 70, 1_600_000)
    assert (loaded.classes, loaded.fingerprint) == (manifest.classes, manifest.fingerprint)
    assert [entry.samples for entry in loaded.shards] == [4, 4, 2]
    last = loaded.shards[-1]
    assert last.keys == ["000000000040", "000000000045"]
    assert last.offsets.tolist() == [0, 159_744]
    assert last.sizes.tolist() == [[640, 480], [640, 480]]
    first = (tmp_path / "manifest.json").read_bytes()
    loaded.save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == first


def test_the_document(shards):
    document = json.loads((shards / "manifest.json").read_text())
    assert document["format"] == "convnext-yolo-shards"
    assert document["version"] == 2
    assert document["classes"] == [{"id": 3, "name": "dog"}, {"id": 9, "name": "cat"}]
    assert (document["samples"], document["boxes"]) == (5, 5)
    assert document["bytes"] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert len(document["fingerprint"]) == 64
    first = document["shards"][0]
    assert first["name"] == "shard-000000.tar"
    assert first["keys"] == ["000000000000", "000000000012"]
    assert first["sizes"] == [[64, 24], [32, 48]]
    assert first["offsets"][0] == 0
    assert set(first) == {
        "name",
        "samples",
        "bytes",
        "sha256",
        "keys",
        "offsets",
        "sizes",
        "chunks",
    }


def test_the_manifest_of_coco_loads_well_under_a_second(tmp_path):
    manifest_of(118_287, 512).save(tmp_path)
    start = time.process_time()
    loaded = Manifest.load(tmp_path)
    assert time.process_time() - start < 1
    assert loaded.samples == 118_287
    arrays = [a for e in loaded.shards for a in (e.image_ids, e.blocks, e.sizes, e.chunk_digests)]
    assert sum(array.nbytes for array in arrays) <= 17.1 * 118_287


@pytest.mark.parametrize(("samples", "per_shard"), [(1, 8), (20, 3), (20, 9), (24, 8), (17, 512)])
def test_chunks_cover_a_shard_and_have_its_digests(tmp_path, samples, per_shard):
    shard_dataset(noise(tmp_path, samples), tmp_path / "out", per_shard, progress=False)
    for entry in Manifest.load(tmp_path / "out").shards:
        data = (tmp_path / "out" / entry.name).read_bytes()
        spans = [entry.chunk(number) for number in range(len(entry.chunk_digests))]
        assert spans[0][0] == 0 and spans[-1][1] == len(data)
        assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
        assert [start for start, _ in spans] == entry.offsets[::CHUNK].tolist()
        digests = [hashlib.sha256(data[start:end]).hexdigest()[:16] for start, end in spans]
        assert digests == [f"{digest:016x}" for digest in entry.chunk_digests.tolist()]


def test_folders_without_a_manifest(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such shard folder; make it with"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"the folder is empty, it has no manifest.json; make"):
        Manifest.load(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"not a shard folder, it has no manifest.json; make"):
        Manifest.load(tmp_path)


def first_shard(**values: Any) -> Callable[[Document], None]:
    return lambda document: document["shards"][0].update(values)


BAD = {
    "other format": (lambda d: d.update(format="wids"), ["format is not 'convnext-yolo-shards'"]),
    "other version": (lambda d: d.update(version=1), ["version is 1, this program reads 2"]),
    "no version": (lambda d: d.pop("version"), ["version is None"]),
    "no shards": (lambda d: d.pop("shards"), ["damaged, shards is missing"]),
    "no classes": (lambda d: d.update(classes=[]), ["classes is empty"]),
    "classes no list": (lambda d: d.update(classes=3), ["damaged"]),
    "class no id": (lambda d: d["classes"][0].pop("id"), ["id is missing"]),
    "empty shard list": (lambda d: d.update(shards=[], samples=0, bytes=0), ["no samples"]),
    "shard twice": (lambda d: d["shards"].append(d["shards"][0]), ["a shard is listed twice"]),
    "wrong total": (lambda d: d.update(samples=6), ["samples is 6 but its shards hold 5"]),
    "wrong bytes": (lambda d: d.update(bytes=1), ["bytes is 1 but"]),
    "shard no object": (lambda d: d["shards"].append("x"), ["damaged"]),
    "name leads away": (first_shard(name="../x.tar"), ["'../x.tar' is not a shard's name"]),
    "name is a pipe": (first_shard(name="pipe:rm x.tar"), ["is not a shard's name"]),
    "keys no ids": (first_shard(keys=["a", "b"]), ["damaged"]),
    "keys not in 12 digits": (first_shard(keys=["0", "12"]), ["image ids in 12 digits"]),
    "keys too few": (first_shard(keys=["000000000000"]), ["1 keys, 2 offsets"]),
    "keys huge": (first_shard(keys=["9" * 30, "000000000012"]), ["damaged"]),
    "offsets falling": (first_shard(offsets=[512, 0]), ["bad offsets"]),
    "offsets odd": (first_shard(offsets=[0, 513]), ["bad offsets"]),
    "offsets beyond the end": (first_shard(offsets=[0, 512 * 10**6]), ["bad offsets"]),
    "offsets negative": (first_shard(offsets=[-512, 0]), ["bad offsets"]),
    "sizes flat": (first_shard(sizes=[1, 2]), ["1 sizes"]),
    "chunks too few": (first_shard(chunks=[]), ["0 chunks for 1 x 8 samples"]),
    "chunks no digests": (first_shard(chunks=["x"]), ["damaged"]),
    "chunks too long": (first_shard(chunks=["f" * 17]), ["damaged"]),
    "sizes zero": (first_shard(sizes=[[0, 1], [1, 1]]), ["image sizes below 1"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_manifest_gives_one_sentence(shards, case):
    spoil, parts = BAD[case]
    path = shards / "manifest.json"
    document = json.loads(path.read_text())
    spoil(document)
    path.write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        Manifest.load(shards)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith(".")
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff"])
def test_a_manifest_that_is_no_manifest(shards, content):
    (shards / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json: the (manifest is damaged|format is not)"):
        Manifest.load(shards)


def test_missing_looks_at_sizes_only(shards):
    manifest = Manifest.load(shards)
    assert manifest.missing(shards) == []
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    (shards / "shard-000002.tar").unlink()
    problems = manifest.missing(shards)
    assert len(problems) == 2
    assert "has 3000 bytes, the manifest says" in problems[0]
    assert "shard-000002.tar: the shard is missing" in problems[1]
