"""Outputs at a URL, with fsspec's own stores: a folder and memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import fsspec
import pytest

from convnext_yolo.data_prep import upload
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.manifest import Manifest
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.data_prep.verify import verify

from .conftest import CocoFiles


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "file": f"file://{tmp_path}/store/shards",
        "memory": f"memory://{tmp_path.name}/store/shards",
    }[request.param]


def fetched(url: str) -> dict[str, bytes]:
    """What lies at a URL."""
    store, root = fsspec.url_to_fs(url)
    store.invalidate_cache()
    return {name.rpartition("/")[2]: store.cat_file(name) for name in store.ls(root, detail=False)}


def write(files: CocoFiles, url: str, **options: object) -> Manifest:
    options = {"samples_per_shard": 2, "progress": False, **options}
    return shard_dataset(files.read(), url, scratch=files.folder / "scratch", **options)[0]


class Interrupted(Exception):
    """Comes in the place of a kill."""


@pytest.fixture
def upload_ends_at(monkeypatch: pytest.MonkeyPatch):
    """`upload_ends_at(1)`: the second file that is uploaded isn't, and the run is over."""
    real = upload.RemoteOutput._upload

    def arrange(position: int) -> None:
        calls = itertools.count()

        def upload_or_end(self, path):
            if next(calls) == position:
                raise Interrupted
            real(self, path)

        monkeypatch.setattr(upload.RemoteOutput, "_upload", upload_or_end)

    return arrange


def test_the_bytes_are_those_of_a_folder(coco_files, tmp_path, url, capsys):
    coco_files.shard(tmp_path / "out")
    manifest = write(coco_files, url)
    assert fetched(url) == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert list((coco_files.folder / "scratch").iterdir()) == []

    again = write(coco_files, url, progress=True)
    assert again.fingerprint == manifest.fingerprint
    assert "holds these 5 samples already" in capsys.readouterr().err


def test_an_ended_run_is_continued_and_has_no_manifest_before(
    coco_files, tmp_path, url, upload_ends_at, capsys
):
    coco_files.shard(tmp_path / "out")
    upload_ends_at(0)
    with pytest.raises(Interrupted):
        write(coco_files, url)
    assert list((coco_files.folder / "scratch").iterdir()) == []  # nothing to go on from
    names = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "report.json"]
    for count in range(1, 5):
        upload_ends_at(1)
        with pytest.raises(Interrupted):
            write(coco_files, url)
        assert sorted(fetched(url)) == sorted(names[:count])
    upload_ends_at(99)
    write(coco_files, url, progress=True)
    assert "goes on after 3 of 3 shards" in capsys.readouterr().err
    assert fetched(url) == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_a_shard_that_is_cut_short_in_the_store_is_sent_again(
    coco_files, tmp_path, url, upload_ends_at
):
    upload_ends_at(2)
    with pytest.raises(Interrupted):
        write(coco_files, url)
    store, root = fsspec.url_to_fs(url)
    store.pipe_file(f"{root}/shard-000000.tar", b"half")
    upload_ends_at(99)
    write(coco_files, url)
    coco_files.shard(tmp_path / "out")
    assert fetched(url) == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_an_output_of_something_else_is_refused(coco_files, url):
    store, root = fsspec.url_to_fs(url)
    store.makedirs(root, exist_ok=True)
    store.pipe_file(f"{root}/thesis.txt", b"years")
    with pytest.raises(DataError, match=r"shards: exists and is not a shard folder.*'thesis.txt'"):
        write(coco_files, url)
    store.rm_file(f"{root}/thesis.txt")

    store.pipe_file(f"{root}/shard-000007.tar", b"of another run")
    with pytest.raises(DataError, match=r"holds shard-000007.tar of an unfinished output"):
        write(coco_files, url)
    store.rm_file(f"{root}/shard-000007.tar")

    write(coco_files, url)
    with pytest.raises(DataError, match=r"holds shards of another input or with other settings"):
        write(coco_files, url, samples_per_shard=3)
    store.rm_file(f"{root}/shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001.tar: the shard is missing"):
        write(coco_files, url)


def test_a_store_that_fails_is_told_in_a_sentence_and_continued(
    coco_files, url, monkeypatch, tmp_path
):
    store = fsspec.url_to_fs(url)[0]

    def fail(*args, **options):
        raise RuntimeError("no credentials")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_file", fail)
        with pytest.raises(DataError, match=r"can't be written \(RuntimeError: no credentials\)"):
            write(coco_files, url)
    write(coco_files, url)
    local = tmp_path / "local"
    local.mkdir()
    for name, data in fetched(url).items():
        (local / name).write_bytes(data)
    assert verify(local, progress=False) == []


def test_addresses_that_are_none(coco_files):
    with pytest.raises(DataError, match=r"nosuch://x: can't be opened .*correct the URL"):
        write(coco_files, "nosuch://x")


def test_somebody_elses_scratch_folder_is_not_used(coco_files, url, tmp_path):
    (tmp_path / "theirs").mkdir()
    output = upload.RemoteOutput(url, coco_files.folder / "scratch")
    output._scratch.parent.mkdir()
    output._scratch.symlink_to(tmp_path / "theirs")
    with pytest.raises(DataError, match=r"is somebody else's; give your own with --scratch"):
        write(coco_files, url)


def test_a_store_that_cannot_be_reached_is_told_in_a_sentence(coco_files):
    """Some connect as soon as they are named."""
    with pytest.raises(DataError, match=r"ftp://127\.0\.0\.1:1/x: can't be opened"):
        write(coco_files, "ftp://127.0.0.1:1/x")
