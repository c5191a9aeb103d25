"""metrics.jsonl after kills, resumes and full disks."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.recipes import files
from convnext_yolo.recipes.config import Recipe
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.tracking import Tracker, pictures_path, read_metrics


def quiet() -> Recipe:
    return load_recipe([], ["--tracking.wandb", "off"])


def record(step: int, kind: str = "train") -> dict[str, object]:
    return {"kind": kind, "step": step, "box": step / 10}


def write(folder: Path, steps: range, start: int = 0) -> None:
    tracker = Tracker(quiet(), folder, start, {})
    for step in steps:
        tracker.log(record(step))
    tracker.close()


def test_a_resume_drops_what_it_repeats(tmp_path: Path) -> None:
    write(tmp_path, range(1, 7))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a kill in the middle of a line
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    tracker = Tracker(quiet(), tmp_path, 4, {})  # from the checkpoint of step 4
    tracker.log(record(5))
    assert read_metrics(tmp_path) == [record(step) for step in range(1, 6)]  # on disk at once
    tracker.close()


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 3}\n')
    Tracker(quiet(), tmp_path, 0, {}).close()
    assert read_metrics(tmp_path) == []


def test_a_file_cut_off_anywhere_loses_one_record_at_most(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        rest, count = length, 0
        while count < 3 and rest >= len(lines[count]) - 1:  # the newline itself is not needed
            rest -= len(lines[count])
            count += 1
        write(tmp_path, range(4, 5), start=3)
        assert [r["step"] for r in read_metrics(tmp_path)] == [*range(1, count + 1), 4], length


def test_a_kill_while_the_file_is_rewound_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, range(1, 7))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    child = os.fork()
    if not child:  # ends with the new file written, and not yet in the place of the old one
        monkeypatch.setattr(files.Path, "replace", lambda *_: os._exit(9))
        Tracker(quiet(), tmp_path, 4, {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "metrics.jsonl.partial").exists()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    write(tmp_path, range(5, 7), start=4)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "metrics.jsonl.partial").exists()


def test_a_resume_that_repeats_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    write(tmp_path, range(5, 6), start=4)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_an_evaluation_that_is_done_again_is_there_once(tmp_path: Path) -> None:
    tracker = Tracker(quiet(), tmp_path, 0, {})
    tracker.log(record(4))
    tracker.log(record(4, "val"))
    tracker.close()  # killed before a checkpoint says that step 4 was evaluated
    tracker = Tracker(quiet(), tmp_path, 4, {})
    tracker.log(record(4, "val"))
    tracker.log(record(8))
    tracker.close()
    assert read_metrics(tmp_path) == [record(4), record(4, "val"), record(8)]


def test_a_full_disk_stops_nothing_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(quiet(), tmp_path, 0, {})
    tracker.log(record(1))
    disk = FullDisk(tracker._file, space=10)
    tracker._file = disk  # type: ignore[assignment]
    tracker.log(record(2))
    tracker.log(record(3))
    assert read_metrics(tmp_path) == [record(1)]  # no half of a line
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    disk.space = 10_000
    tracker.log(record(4))
    tracker.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("No space left on device") == 2


class FullDisk:
    """A file on a disk with only so many bytes left."""

    def __init__(self, file: Any, space: int):
        self.file, self.space = file, space

    def write(self, data: bytes) -> int:
        if not self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = int(self.file.write(data[: self.space]))
        self.space -= count
        return count

    def truncate(self, size: int) -> None:
        self.space += self.file.seek(0, os.SEEK_END) - size
        self.file.truncate(size)

    def close(self) -> None:
        self.file.close()


def test_what_an_evaluation_says_of_the_classes_is_a_file(tmp_path: Path) -> None:
    tracker = Tracker(quiet(), tmp_path, 0, {})
    per_class = {"RBC": {"AP": 0.5, "AP50": 0.7}}
    path = pictures_path(tmp_path, 12)
    tracker.log_evaluation(12, per_class, [path])
    assert path.name == "step-00000012.jpg"
    assert json.loads(path.with_suffix(".json").read_text()) == [
        {"class": "RBC", "AP": 0.5, "AP50": 0.7}
    ]
    with pytest.raises(ValueError, match=r"step-00000016\.jpg"):
        tracker.log_evaluation(16, per_class, [path])
    tracker.close()
