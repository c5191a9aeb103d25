"""Folders and archives that hold something else than they should."""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ANNOTATIONS = "annotations/annotations_trainval2017.zip"
VAL = "zips/val2017.zip"


# --- folders and archives that hold something else -----------------------------------------------


def test_a_users_own_folder_must_be_whole(run, mirror, complete):
    run()
    names = sorted(path.name for path in (run.output / "val2017").iterdir())
    (run.output / "val2017" / names[0]).unlink()
    assert f"val2017: holds {len(names) - 1} files, where {len(names)} are due" in run.fails()
    shutil.rmtree(run.output / "val2017")
    (run.output / "annotations" / "instances_val2017.json").write_text("{}")
    assert "instances_val2017.json: is 2 bytes long" in run.fails()
    (run.output / "annotations" / "instances_val2017.json").unlink()
    assert "instances_val2017.json: is missing" in run.fails()
    shutil.rmtree(run.output / "annotations")
    (run.output / "annotations").mkdir()  # empty: as if it weren't there
    run()
    assert run.tree() == complete


def test_a_partial_folder_with_a_users_file_is_left_alone(run):
    (run.output / "val2017.partial").mkdir(parents=True)
    (run.output / "val2017.partial" / "notes.txt").write_text("mine")
    assert (
        "val2017.partial: is needed for the work in progress but holds 'notes.txt'" in run.fails()
    )
    assert (run.output / "val2017.partial" / "notes.txt").read_text() == "mine"


def test_an_output_that_is_a_file(run):
    run.output.write_text("mine")
    assert "coco" in run.fails() and run.output.read_text() == "mine"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"val2017/../../evil.jpg": b"x"}, "'val2017/../../evil.jpg', which leads elsewhere"),
        ({"../evil.jpg": b"x"}, "'../evil.jpg', which leads elsewhere"),
        ({"/evil.jpg": b"x"}, "'/evil.jpg', which leads elsewhere"),
        ({"val2017/..\\evil.jpg": b"x"}, "which leads elsewhere"),
        ({"val2017/..": b"x"}, "which leads elsewhere"),
        ({"val2017/a.jpg": b"x"}, "holds 1 files of val2017/, not 2 files"),
        ({"val2017/a.jpg": b"x", "b.jpg": b"x"}, "holds 1 files of val2017/, not 2 files"),
        ({"val2017/a.jpg": b"x", "val2017/b/c.jpg": b"x"}, "holds 1 files of val2017/"),
    ],
)
def test_a_zip_with_other_files(run, mirror, tmp_path, zipped, files, said):
    refuse_zip(run, mirror, tmp_path, zipped(files), said)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_file_twice(run, mirror, tmp_path):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as bundle:
        bundle.writestr("val2017/a.jpg", b"one")
        bundle.writestr("val2017/a.jpg", b"two")
    refuse_zip(run, mirror, tmp_path, memory.getvalue(), "holds 'val2017/a.jpg' twice")


def test_a_zip_that_is_none(run, mirror, tmp_path):
    refuse_zip(run, mirror, tmp_path, b"<html>", "can't be unpacked (File is not a zip file)")


def test_a_zip_that_is_damaged_or_locked(run, mirror, tmp_path, zipped):
    spoilt = bytearray(
        zipped({"val2017/a.jpg": random.Random(1).randbytes(1000), "val2017/b.jpg": b"x"})
    )
    spoilt[500] ^= 1
    refuse_zip(run, mirror, tmp_path, bytes(spoilt), "can't be unpacked (Bad CRC-32")
    locked = bytearray(zipped({"val2017/a.jpg": b"x", "val2017/b.jpg": b"x"}))
    locked[locked.index(b"PK\1\2") + 8] |= 1  # says that it's encrypted
    locked[6] |= 1
    refuse_zip(run, mirror, tmp_path, bytes(locked), "is encrypted")


def refuse_zip(run: Any, mirror: Any, tmp_path: Path, content: bytes, said: str) -> None:
    """As `run` would refuse a zip that is the official one by size and MD5."""
    mirror.files[VAL] = content
    md5 = hashlib.md5(content).hexdigest()
    run.table[1] = replace(run.table[1], size_bytes=len(content), md5=md5, files=2)
    run.output.mkdir(exist_ok=True)
    (run.output / "val2017.zip").unlink(missing_ok=True)
    assert said in run.fails(only=["val"])
    assert not (run.output / "val2017").exists() and not list(tmp_path.rglob("*evil*"))
    assert not Path("/evil.jpg").exists()


def test_annotations_of_another_length(run, mirror, zipped):
    content = zipped(
        {f"annotations/instances_{split}2017.json": b"{}" for split in ("train", "val")}
    )
    mirror.files[ANNOTATIONS] = content
    md5 = hashlib.md5(content).hexdigest()
    run.table[0] = replace(run.table[0], size_bytes=len(content), md5=md5)
    assert "annotations/instances_train2017.json is 2 bytes long, not " in run.fails()
