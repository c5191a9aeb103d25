"""Reading remote shards: what is fetched, kept and checked."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convnext_yolo.data_prep import remote as remote_module
from convnext_yolo.data_prep import source as source_module
from convnext_yolo.data_prep.cache import CacheOptions
from convnext_yolo.data_prep.errors import CorruptSampleError, DataError
from convnext_yolo.data_prep.manifest import CHUNK, Manifest, ShardEntry, narrow
from convnext_yolo.data_prep.reader import ShardReader
from convnext_yolo.data_prep.records import Category
from convnext_yolo.data_prep.source import LocalShards, RemoteShards

from .fake_host import PATIENCE_S, URL, Host, HTTPError, Time, far_shards


@pytest.fixture
def host(noise_shards: Path) -> Host:
    return Host(noise_shards)


@pytest.fixture
def shards(host: Host, noise_shards: Path, tmp_path: Path) -> RemoteShards:
    return far_shards(host, noise_shards, tmp_path, Time())


@pytest.fixture
def reader_of(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    monkeypatch.setattr(remote_module, "_connect", host.connect)
    return lambda: ShardReader(URL, CacheOptions(str(tmp_path / "cache"), 1, PATIENCE_S))


def cached_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/chunks").glob("*/*/*"))


def test_every_sample_is_the_one_on_disk(reader_of, host, noise_shards, tmp_path):
    local, far = ShardReader(noise_shards), reader_of()
    assert (len(far), far.classes) == (len(local), local.classes)
    assert np.array_equal(far.sizes_px(), local.sizes_px())
    for position in np.random.default_rng(0).permutation(len(local)).tolist():
        assert far.read(position) == local.read(position)
    # Six shards of ten samples, the last of seven: each chunk is fetched once, and kept.
    chunks = [asked for asked in host.asked if asked[0] != "manifest.json"]
    assert len(chunks) == len(set(chunks)) == 5 * 2 + 1
    assert len(cached_files(tmp_path)) == 11
    again = reader_of()
    assert [again.read(i) for i in range(57)] == [local.read(i) for i in range(57)]
    assert len(host.asked) == 2 + 11  # the manifest twice


def test_only_the_chunk_of_a_sample_is_fetched(shards, host):
    entry = shards.entries[2]
    shards.open_at(2, 9)
    assert host.asked == [(entry.name, *entry.chunk(1))]


def test_without_a_cache_that_holds_it_a_chunk_is_read_all_the_same(
    host, noise_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(source_module, "MAX_UNCACHED_BYTES", 200_000)
    shards, local = (
        far_shards(host, noise_shards, tmp_path, Time(), gib=1e-9),
        LocalShards(noise_shards, Manifest.load(noise_shards)),
    )
    for shard in range(6):
        for within in (0, 6, 1):
            (far, offset), (near, start) = (
                shards.open_at(shard, within),
                local.open_at(shard, within),
            )
            far.seek(offset)
            near.seek(start)
            assert far.read(3000) == near.read(3000)
        in_memory = shards.opened.files.values()
        assert len(in_memory) == 1 or sum(len(f.getbuffer()) for f in in_memory) <= 200_000
    assert not cached_files(tmp_path)


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "fault", [flipped, lambda content: content[:-9], lambda content: b"", HTTPError(416)]
)
def test_a_chunk_that_arrives_wrong_is_fetched_once_more(reader_of, host, noise_shards, fault):
    far, local = reader_of(), ShardReader(noise_shards)
    host.faults = [fault]
    assert far.read(0) == local.read(0)
    assert len(host.asked) == 3

    host.always = fault
    for position in (10, 11, 10, 17):
        with pytest.raises(CorruptSampleError) as error:
            far.read(position)
        assert "secret" not in str(error.value)
    assert error.value.shard == "https://data.example:8443/sets/noise/shard-000001.tar"
    assert error.value.key == f"{3 * 17:012d}"
    assert len(host.asked) == 5  # not again for each of its samples
    host.always = None
    assert far.read(18) == local.read(18)


def test_a_spoilt_cache_is_mended(reader_of, host, tmp_path):
    expected = [reader_of().read(position) for position in range(57)]
    files = cached_files(tmp_path)
    os.truncate(files[0], 100)
    files[1].write_bytes(flipped(files[1].read_bytes()))
    files[2].unlink()
    files[3].unlink()
    files[3].mkdir()
    host.asked.clear()
    far = reader_of()
    assert [far.read(position) for position in range(57)] == expected
    assert len(host.asked) == 1 + 4
    host.asked.clear()
    assert [reader_of().read(position) for position in range(57)] == expected
    assert {asked[0] for asked in host.asked} <= {"manifest.json", files[3].parent.name}


def test_the_cache_may_vanish_while_it_is_read(reader_of, tmp_path):
    far = reader_of()
    expected = [far.read(position) for position in range(57)]
    far.source.opened.files.clear()
    shutil.rmtree(tmp_path / "cache")
    assert [far.read(position) for position in range(57)] == expected


def test_a_full_disk_ends_the_caching_not_the_reading(
    reader_of, noise_shards, tmp_path, monkeypatch, capsys
):
    local, far = ShardReader(noise_shards), reader_of()

    def full(path: Path, content: bytes) -> int:
        path.open("wb").write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert [far.read(i) for i in range(57)] == [local.read(i) for i in range(57)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the cache folder {tmp_path / 'cache'}: No space left on device; ")
    assert not cached_files(tmp_path)


def test_a_cache_folder_that_cannot_be_is_named(host, noise_shards, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache: .*; name another with data.cache"):
        far_shards(host, noise_shards, tmp_path, Time())


def test_data_sets_of_one_name_do_not_meet_in_the_cache(host, noise_shards, tmp_path):
    """A manifest says of itself what its fingerprint is, and a folder is made after it."""
    manifest = json.loads((noise_shards / "manifest.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(noise_shards, other)
    manifest["fingerprint"] = "../../../evil\ud800"
    for shard in manifest["shards"]:
        shard["chunks"] = [f"{n:016x}" for n in range(len(shard["chunks"]))]
    (other / "manifest.json").write_text(json.dumps(manifest))
    before = sorted(tmp_path.iterdir())
    shards = far_shards(host, other, tmp_path, Time())
    with pytest.raises(OSError, match="not those of the manifest"):
        shards.open_at(0, 0)
    far_shards(host, noise_shards, tmp_path, Time()).open_at(0, 0)
    assert sorted({*tmp_path.iterdir()} - {*before}) == [tmp_path / "cache"]
    assert len(cached_files(tmp_path)) == 1


class Disk(Host):
    """A host that comes from nowhere, as fsspec's do: readers that have one can be pickled."""

    folder = Path()

    def __init__(self, scheme: str, request_s: float):
        super().__init__(self.folder)


def test_a_reader_travels_without_connections_and_files(noise_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Disk, "folder", noise_shards)
    monkeypatch.setattr(remote_module, "_connect", Disk)
    far, local = ShardReader(URL, CacheOptions(str(tmp_path / "cache"))), ShardReader(noise_shards)
    assert far.read(3) == local.read(3)
    copy = pickle.loads(pickle.dumps(far))
    assert not copy.source.opened.files
    assert copy.source.folder._filesystem is None
    assert copy.read(3) == local.read(3)
    assert copy.read(40) == far.read(40)


def coco_manifest() -> Manifest:
    entries = []
    for start in range(0, 118_287, 512):
        count = min(512, 118_287 - start)
        entries.append(
            ShardEntry(
                name=f"shard-{start // 512:06d}.tar",
                bytes=count * 160_000,
                sha256=f"{start:064x}",
                image_ids=narrow(np.arange(start, start + count) * 5),
                blocks=np.arange(count, dtype=np.uint32) * np.uint32(312),
                sizes=np.tile(np.array([640, 480], np.int32), (count, 1)),
                chunk_digests=np.arange(-(-count // CHUNK), dtype=np.uint64) + 2**60,
            )
        )
    return Manifest((Category(1, "cat"),), 0, "f" * 64, tuple(entries))


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_reader_of_coco_is_made_quickly_and_travels_light(tmp_path, monkeypatch, is_remote):
    coco_manifest().save(tmp_path)
    monkeypatch.setattr(Disk, "folder", tmp_path)
    monkeypatch.setattr(remote_module, "_connect", Disk)
    cache = CacheOptions(str(tmp_path / "cache"))
    start_s = time.process_time()
    reader = ShardReader("s3://bucket/coco" if is_remote else tmp_path, cache)
    assert time.process_time() - start_s < 1
    assert len(pickle.dumps(reader)) <= 16 * 118_287
