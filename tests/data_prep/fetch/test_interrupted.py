"""Runs that end early, and disks that are too small."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tqdm

VAL = "zips/val2017.zip"
TRAIN = "zips/train2017.zip"


# --- runs that end early -------------------------------------------------------------------------


KILLED = """
import json, os, signal, sys
import tqdm
given = json.loads(sys.argv[1])

class Bar(tqdm.tqdm):  # counts what was written, and kills the process in the middle
    def __init__(self, *args, desc="", **options):
        self.name = desc
        self.count = 0
        super().__init__(*args, desc=desc, **options)

    def update(self, n=1):
        self.count += n
        if self.name == given["during"] and self.count >= given["after_bytes"]:
            os.kill(os.getpid(), signal.SIGKILL)

tqdm.tqdm = Bar
os.sync = lambda: None
from convnext_yolo.data_prep.fetch import Archive, fetch_coco
fetch_coco(given["output"], given["mirror"], table=[Archive(**a) for a in given["table"]])
"""


def killed(run: Any, during: str, after_bytes: int) -> None:
    """Runs until the bar of that name counts so many bytes, then as after `kill -9`."""
    given = {
        "output": str(run.output),
        "mirror": run.mirror.url,
        "table": [vars(archive) for archive in run.table],
        "during": during,
        "after_bytes": after_bytes,
    }
    result = subprocess.run([sys.executable, "-c", KILLED, json.dumps(given)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()


@pytest.mark.process
def test_killed_in_a_download_the_next_run_fetches_only_the_rest(run, mirror, zips, complete):
    killed(run, "train2017.zip", after_bytes=200_000)
    have = (run.output / "train2017.zip.partial").stat().st_size
    assert 200_000 <= have < len(zips[TRAIN])
    mirror.asked.clear()
    run()
    assert run.tree() == complete
    assert mirror.asked == [(TRAIN, have, len(zips[TRAIN]) - have)]


@pytest.mark.process
def test_killed_while_unpacking_the_next_run_writes_only_the_rest(run, mirror, complete):
    killed(run, "unpack train2017", after_bytes=300_000)
    partial = run.output / "train2017.partial"
    written = {path.name: path.stat().st_ino for path in partial.iterdir()}
    assert len(written) == 3 and not (run.output / "train2017").exists()
    mirror.asked.clear()
    # a machine that loses its power leaves worse: a short file, and one of the right length
    names = sorted(written)
    mtime_ns = (partial / names[0]).stat().st_mtime_ns
    (partial / names[1]).write_bytes(b"short")
    (partial / names[2]).write_bytes(bytes(100_000))
    run()
    assert run.tree() == complete and not mirror.asked
    assert (run.output / "train2017" / names[0]).stat().st_mtime_ns == mtime_ns


def test_interrupted_it_says_so_and_goes_on_the_next_time(
    run, mirror, zips, complete, command, monkeypatch, capsys
):
    class Bar(tqdm.tqdm):
        def update(self, n: float = 1) -> None:
            if self.total == len(zips[TRAIN]):
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tqdm, "tqdm", Bar)
        assert command() == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "convnext-yolo fetch-coco: interrupted" and "Traceback" not in str(said)
    have = (run.output / "train2017.zip.partial").stat().st_size
    assert 0 < have < len(zips[TRAIN])
    assert command() == 0
    assert run.tree() == complete and mirror.asked[-1][1] == have


def test_a_second_run_at_the_same_time_is_refused(run, mirror):
    sentences = []

    def meanwhile(wait_s: float) -> None:
        sentences.append(run.fails())

    mirror.faults[VAL] = [dict(status=503)]
    run(sleep=meanwhile)
    assert "another run is fetching to there" in sentences[0] and len(sentences) == 1


# --- disks ---------------------------------------------------------------------------------------


def free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_a_small_disk_is_refused_before_anything(run, mirror, monkeypatch):
    free(monkeypatch, 0)
    sentence = run.fails()
    assert str(run.output) in sentence and "0.0 GB are free; make room" in sentence
    assert not mirror.asked and not run.output.exists()


def test_how_much_room_is_needed(run, mirror, monkeypatch, zips, tmp_path):
    unpacked = [archive.unpacked_bytes for archive in run.table]
    zipped = [archive.size_bytes for archive in run.table]
    have = tmp_path / "have"
    have.mkdir()
    for path, content in zips.items():
        (have / Path(path).name).write_bytes(content)
    # zips go when they are unpacked, so the last and largest decides
    needs = {
        sum(unpacked) + zipped[2]: {},
        sum(unpacked) + sum(zipped): {"keep_archives": True},
        sum(unpacked): {"archives": have},
        sum(unpacked[:2]) + zipped[1]: {"only": ["val"]},
    }
    for needed, options in needs.items():
        free(monkeypatch, needed - 1)
        assert "are needed there" in run.fails(**options)
        free(monkeypatch, needed)
        run(**options)
        shutil.rmtree(run.output)
    # what is there already needs no more room
    run.output.mkdir()
    (run.output / "train2017.zip.partial").write_bytes(zips[TRAIN][:1000])
    free(monkeypatch, sum(unpacked) + zipped[2] - 1000)
    run()


def test_a_disk_that_fills_up(run, complete, monkeypatch):
    from convnext_yolo.data_prep import unpack as module

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", str(run.output / "train2017.partial"))

    with monkeypatch.context() as patch:
        patch.setattr(module, "_extract", full)
        assert "train2017.partial: No space left on device; " in run.fails(only=["train"])
    run()
    assert run.tree() == complete


def test_a_download_that_cannot_be_written(run, mirror, complete):
    """The real thing: the kernel refuses to let the file grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        assert "File too large; mend that, then run the command again" in run.fails(only=["train"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not run.waits_s
    run()
    assert run.tree() == complete
    assert (TRAIN, 200_000) in [asked[:2] for asked in mirror.asked]
