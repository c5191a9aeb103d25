"""A run that was ended goes on where it was, and never with what is no longer right."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convnext_yolo.data_prep import tar_writer
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.samples import encode_annotations
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.data_prep.verify import verify

from .conftest import picture


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture
def interrupted_at(monkeypatch) -> Callable[[int, BaseException], None]:
    """`interrupted_at(3, KeyboardInterrupt())`: the fourth sample that is written from now on."""

    def arrange(position: int, exception: BaseException) -> None:
        calls = itertools.count()

        def fail(record):
            if next(calls) == position:
                raise exception
            return encode_annotations(record)

        monkeypatch.setattr(tar_writer, "encode_annotations", fail)

    return arrange


INTERRUPTIONS = [KeyboardInterrupt(), OSError(28, "No space left on device")]


@pytest.mark.parametrize("exception", INTERRUPTIONS, ids=repr)
def test_an_interruption_before_the_first_shard_leaves_nothing(
    coco_files, tmp_path, interrupted_at, exception
):
    dataset = coco_files.read()
    interrupted_at(1, exception)
    expected = DataError if isinstance(exception, OSError) else type(exception)
    with pytest.raises(expected) as caught:
        shard_dataset(dataset, tmp_path / "new" / "out", samples_per_shard=2, progress=False)
    if expected is DataError:
        assert "new/out: the shards can't be written (No space left on device)" in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("exception", INTERRUPTIONS, ids=repr)
def test_an_ended_run_is_continued(coco_files, tmp_path, interrupted_at, capsys, exception):
    coco_files.shard(tmp_path / "whole")
    interrupted_at(3, exception)
    with pytest.raises((KeyboardInterrupt, DataError)):
        coco_files.shard(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    first = (partial / "shard-000000.tar").stat()

    interrupted_at(99, exception)
    coco_files.shard(tmp_path / "out", progress=True)
    assert "out: goes on after 1 of 3 shards." in capsys.readouterr().err
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == first.st_mtime_ns
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not partial.exists()


CHANGES = {
    "an image": (lambda files: picture((64, 24), 9).save(files.image(3)), 0),
    "an image of another shard": (lambda files: picture((40, 40), 9).save(files.image(2)), 1),
    "a box": (lambda files: files.document["annotations"][1].update(bbox=[1, 2, 3, 4]), 0),
    "classes": (lambda files: files.document["categories"][0].update(name="lion"), 0),
    "the tar": (lambda files: cut_in_half(files.folder.parent / "out.partial"), 0),
    "the journal": (lambda files: cut_in_half(files.folder.parent / "out.partial", "jsonl"), 0),
}


def cut_in_half(partial: Path, suffix: str = "0.tar") -> None:
    path = next(partial.glob(f"*{suffix}"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_goes_on_with_the_shards_that_are_still_right(
    coco_files, tmp_path, interrupted_at, capsys, case
):
    interrupted_at(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        coco_files.shard(tmp_path / "out")
    change, kept = CHANGES[case]
    change(coco_files)
    interrupted_at(99, KeyboardInterrupt())
    coco_files.shard(tmp_path / "out", progress=True)
    assert ("goes on after 1 of 3" in capsys.readouterr().err) == bool(kept)
    assert verify(tmp_path / "out", progress=False) == []
    coco_files.shard(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_other_shard_sizes_start_afresh(coco_files, tmp_path, interrupted_at):
    interrupted_at(4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        coco_files.shard(tmp_path / "out", samples_per_shard=1)
    interrupted_at(99, KeyboardInterrupt())
    manifest = coco_files.shard(tmp_path / "out", samples_per_shard=3)
    assert [entry.samples for entry in manifest.shards] == [3, 2]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    assert verify(tmp_path / "out", progress=False) == []


def test_a_journal_that_outlived_its_run_is_cleared(coco_files, tmp_path):
    coco_files.shard(tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "journal.jsonl").write_text("killed just after the rename")
    coco_files.shard(tmp_path / "out")
    assert contents(tmp_path / "out") == before


SCRIPT = """
import dataclasses, sys
from pathlib import Path
from convnext_yolo.data_prep.formats import read_coco
from convnext_yolo.data_prep.shard import shard_dataset

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dataset = read_coco(folder / "instances.json", folder / "images")
    dataset.images[:] = [  # long enough to be interrupted
        dataclasses.replace(dataset.images[i % 5], id=i) for i in range(6000)
    ]
    shard_dataset(dataset, Path(sys.argv[2]), samples_per_shard=500, workers=int(sys.argv[3]))
"""


@pytest.mark.process
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process_and_is_continued(coco_files, tmp_path, end):
    coco_files.read()
    script, output = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(coco_files.folder)]
    run = subprocess.Popen(
        [*command, str(output), "2"], stderr=subprocess.DEVNULL, start_new_session=True
    )
    journal = tmp_path / "out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and b"\n" in journal.read_bytes()):  # the first shard is noted
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(run.pid, end) if end == signal.SIGINT else run.kill()
    assert run.wait(60) != 0
    assert not output.exists()
    assert journal.exists()
    while processes_of(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(run.pid) == []

    again = subprocess.run([*command, str(output), "2"], capture_output=True, text=True)
    assert again.returncode == 0
    assert "of 12 shards." in again.stderr
    assert verify(output, progress=False) == []
    subprocess.run([*command, str(tmp_path / "whole"), "1"], check=True, capture_output=True)
    assert contents(output) == contents(tmp_path / "whole")


def processes_of(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, sid = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            found.append(int(folder.name))
    return found
