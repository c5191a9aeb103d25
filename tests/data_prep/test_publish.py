from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from pathlib import Path

import pytest

from convnext_yolo.data_prep import tar_writer
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.samples import encode_annotations
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.data_prep.verify import verify


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_finished_output_is_left_alone_and_says_so(coco_files, tmp_path, capsys):
    output = tmp_path / "out"
    coco_files.shard(output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    manifest = coco_files.shard(output, progress=True)
    assert "out: holds these 5 samples already" in capsys.readouterr().err
    assert manifest.samples == 5
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_touched_images_are_the_same_input_and_changed_ones_are_not(coco_files, tmp_path):
    output = tmp_path / "out"
    coco_files.shard(output)
    time.sleep(0.02)
    coco_files.image(4).touch()
    coco_files.shard(output)

    data = bytearray(coco_files.image(4).read_bytes())
    data[-4] ^= 255  # a BMP pixel: the size stays
    coco_files.image(4).write_bytes(data)
    os.utime(coco_files.image(4), (1e9, 1e9))  # `cp -p` brings an old time along
    before = contents(output)
    with pytest.raises(DataError, match=r"e.bmp has changed .*; give another output or remove it"):
        coco_files.shard(output)
    assert contents(output) == before


OTHER_INPUT = {
    "box": lambda d: d["annotations"][0].update(bbox=[1, 2, 3, 4]),
    "crowd": lambda d: d["annotations"][0].update(iscrowd=1),
    "class name": lambda d: d["categories"][0].update(name="lion"),
    "image id": lambda d: d["images"][3].update(id=5),
    "fewer images": lambda d: d["images"].pop(3),
}


@pytest.mark.parametrize("case", [*OTHER_INPUT, "samples per shard"])
def test_an_output_of_another_input_is_refused(coco_files, tmp_path, case):
    coco_files.shard(tmp_path / "out")
    before = contents(tmp_path / "out")
    options = {"samples_per_shard": 3} if case == "samples per shard" else {}
    OTHER_INPUT.get(case, lambda d: None)(coco_files.document)
    with pytest.raises(DataError, match=r"out: holds shards of another input .*remove it\."):
        coco_files.shard(tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


def test_a_folder_of_something_else_is_refused(coco_files, tmp_path):
    precious = tmp_path / "out" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years")
    with pytest.raises(DataError, match=r"out: exists and is not a shard folder"):
        coco_files.shard(precious.parent)
    with pytest.raises(DataError, match=r"thesis.txt: exists and is not a shard folder"):
        coco_files.shard(precious)
    precious.parent.rename(tmp_path / "new.partial")
    with pytest.raises(DataError, match=r"new.partial: is needed .* holds 'thesis.txt'"):
        coco_files.shard(tmp_path / "new")
    assert (tmp_path / "new.partial" / "thesis.txt").read_text() == "years"
    assert not (tmp_path / "new").exists()


def test_a_damaged_output_is_not_taken_for_finished(coco_files, tmp_path):
    coco_files.shard(tmp_path / "out")
    (tmp_path / "out" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar: the shard is missing"):
        coco_files.shard(tmp_path / "out")


def test_an_empty_folder_and_a_link_to_one_will_do(coco_files, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    coco_files.shard(tmp_path / "link")
    assert verify(tmp_path / "real", progress=False) == []
    assert (tmp_path / "link").is_symlink()


def test_what_a_killed_run_left_is_cleared(coco_files, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "shard-000007.tar").write_bytes(b"half")
    (partial / "manifest.json.tmp").write_bytes(b"half")
    coco_files.shard(tmp_path / "out")
    assert verify(tmp_path / "out", progress=False) == []
    assert not partial.exists()


def test_two_runs_do_not_write_into_one_folder(coco_files, tmp_path, monkeypatch):
    dataset = coco_files.read()
    options = {"samples_per_shard": 2, "progress": False}
    inner = []

    def second_run(record):
        if not inner:
            inner.append(None)
            with pytest.raises(DataError, match=r"out.partial: another run is writing there"):
                shard_dataset(dataset, tmp_path / "out", **options)
        return encode_annotations(record)

    monkeypatch.setattr(tar_writer, "encode_annotations", second_run)
    shard_dataset(dataset, tmp_path / "out", **options)
    assert verify(tmp_path / "out", progress=False) == []


def test_settings_out_of_range(coco_files, tmp_path):
    for name in ("samples_per_shard", "workers"):
        with pytest.raises(DataError, match=f"{name} is 0; give at least 1"):
            coco_files.shard(tmp_path / "out", **{name: 0})
    empty = dataclasses.replace(coco_files.read(), images=[])
    with pytest.raises(DataError, match="has no images"):
        shard_dataset(empty, tmp_path / "out")


def test_an_image_that_vanished_after_reading(coco_files, tmp_path):
    dataset = coco_files.read()
    coco_files.image(1).unlink()
    with pytest.raises(DataError, match=r"b.jpg: the image can't be read \(No such file"):
        shard_dataset(dataset, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
