"""`fetch-coco`: what it leaves on the disk, from where, and its command line."""

from __future__ import annotations

import functools
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from convnext_yolo.data_prep import fetch
from convnext_yolo.data_prep.fetch import COCO_2017
from convnext_yolo.launch.cli import main

ROOT = Path(__file__).resolve().parents[3]
ANNOTATIONS = "annotations/annotations_trainval2017.zip"
VAL = "zips/val2017.zip"
TRAIN = "zips/train2017.zip"


# --- what comes of it ----------------------------------------------------------------------------


def test_data_are_laid_out_and_a_second_run_asks_for_nothing(run, mirror, zips, complete, capsys):
    run(progress=True)
    assert run.tree() == complete
    assert mirror.asked == [(path, 0, len(zips[path])) for path in (ANNOTATIONS, VAL, TRAIN)]
    assert capsys.readouterr().err.count("files\n") == 3

    before = {path: path.stat().st_mtime_ns for path in run.output.rglob("*")}
    run(progress=True)
    assert len(mirror.asked) == 3 and not run.waits_s
    assert {path: path.stat().st_mtime_ns for path in run.output.rglob("*")} == before
    assert capsys.readouterr().err.count("there already\n") == 3


def test_only_one_split(run, mirror, complete):
    run(only=["val"])
    assert set(run.tree()) == {name for name in complete if "train2017/" not in name}
    run()  # the rest
    assert run.tree() == complete
    assert [path for path, *_ in mirror.asked] == [ANNOTATIONS, VAL, TRAIN]


def test_archives_stay_if_asked_to(run, mirror, zips, complete):
    run(keep_archives=True)
    kept = {path.rpartition("/")[2]: content for path, content in zips.items()}
    assert run.tree() == complete | kept
    shutil.rmtree(run.output / "train2017")
    run(keep_archives=True)  # unpacks again what it has
    assert run.tree() == complete | kept and len(mirror.asked) == 3


def test_a_folder_with_the_archives(run, mirror, zips, complete, tmp_path):
    have = tmp_path / "have"
    have.mkdir()
    for path, content in zips.items():
        (have / Path(path).name).write_bytes(content)
    before = run.tree(have)
    run(archives=have)
    assert run.tree() == complete and run.tree(have) == before and not mirror.asked


def test_archives_in_the_output_itself_are_the_users(run, zips, complete):
    run.output.mkdir()
    for path, content in zips.items():
        (run.output / Path(path).name).write_bytes(content)
    run(archives=run.output)
    assert set(run.tree()) == set(complete) | {Path(path).name for path in zips}


def test_a_folder_with_wrong_archives(run, zips, tmp_path):
    have = tmp_path / "have"
    have.mkdir()
    for path, content in zips.items():
        (have / Path(path).name).write_bytes(content)
    spoilt = bytearray(zips[VAL])
    spoilt[len(spoilt) // 2] ^= 1
    (have / "val2017.zip").write_bytes(spoilt)
    assert "val2017.zip: has MD5 " in run.fails(archives=have)
    (have / "val2017.zip").write_bytes(zips[VAL][:-1])
    assert f"not {len(zips[VAL]):,}" in run.fails(archives=have)
    (have / "val2017.zip").unlink()
    assert "holds no val2017.zip" in run.fails(archives=have)
    run(archives=have, only=["train"])  # and needs none of val


def test_a_mirror_may_be_a_folder(run, zips, complete, tmp_path):
    for path, content in zips.items():
        (tmp_path / "here" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / path).write_bytes(content)
    run.output.mkdir()
    (run.output / "val2017.zip.partial").write_bytes(zips[VAL][:1000])
    run(mirror=(tmp_path / "here").as_uri() + "/")
    assert run.tree() == complete
    sentence = replace(run, output=tmp_path / "elsewhere").fails(
        mirror=(tmp_path / "gone").as_uri()
    )
    assert "No such file" in sentence and not run.waits_s


# --- the command ---------------------------------------------------------------------------------


def test_the_command_ends_with_the_next_ones(command, run, complete, capsys, tmp_path, monkeypatch):
    assert command() == 0
    assert run.tree() == complete
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert said[0].startswith(str(run.output))
    assert len(said) == 3
    places = {}
    for line, split in zip(said[1:], ("train", "val"), strict=True):
        words = line.split()
        assert words[:2] == ["convnext-yolo", "shard"]
        options = dict(zip(words[2::2], words[3::2], strict=True))
        assert options["--input"] == str(run.output / f"annotations/instances_{split}2017.json")
        assert options["--images"] == str(run.output / f"{split}2017")
        places[split] = options["--output"]
    recipes = list((ROOT / "recipes").glob("*_coco.yaml"))
    assert recipes
    for recipe in recipes:
        data = yaml.safe_load(recipe.read_text())["data"]
        assert {split: data[split] for split in places} == places, recipe

    monkeypatch.chdir(tmp_path)  # and the one of val, which is real, works
    assert main(said[2].split()[1:]) == 0
    assert (tmp_path / "shards/coco/val2017/manifest.json").is_file()


def test_the_command_for_one_split(command, run, capsys):
    assert command("--only", "val", "--keep-archives") == 0
    out = capsys.readouterr().out
    assert "instances_val2017.json" in out and "train2017" not in out
    assert (run.output / "val2017.zip").exists() and not (run.output / "train2017").exists()


def test_the_command_with_archives(command, run, mirror, zips, tmp_path, capsys):
    have = tmp_path / "have"
    have.mkdir()
    assert command("--archives", str(have)) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("convnext-yolo fetch-coco: error: --archives") and error.count("\n") == 1
    )
    for path, content in zips.items():
        (have / Path(path).name).write_bytes(content)
    assert command("--archives", str(have)) == 0 and not mirror.asked


@pytest.mark.parametrize(
    "options",
    [
        ["--archives", "have", "--mirror", "http://127.0.0.1"],
        ["--only", "test"],
        ["--only"],
        ["--split", "val"],
    ],
)
def test_options_that_cannot_be(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fetch-coco", "--output", str(tmp_path), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("convnext-yolo fetch-coco: error: ") and error.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fetch-coco", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in ("--output", "--only", "--mirror", "--archives", "--keep-archives"):
        assert option in out


def test_the_official_table(tmp_path):
    assert [archive.name for archive in COCO_2017] == [
        *("annotations_trainval2017.zip", "val2017.zip", "train2017.zip")
    ]
    for archive in COCO_2017:
        assert re.fullmatch("[0-9a-f]{32}", archive.md5)
        assert archive.unpacked_bytes >= archive.size_bytes
    assert sum(COCO_2017[0].members.values()) == COCO_2017[0].unpacked_bytes
    # what --help says
    room = functools.partial(fetch._needed_bytes, tmp_path, downloads=True, keep=False)
    assert 40e9 < room(COCO_2017) < 41e9
    assert 2e9 < room(COCO_2017[:2]) < 2.2e9
