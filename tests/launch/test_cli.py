"""The command line: quick help, one sentence for a mistake, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from convnext_yolo.launch.cli import ENDS, main
from convnext_yolo.launch.supervision.lifeline import COLLECT_S

PROGRAM = Path(sys.executable).with_name("convnext-yolo")
COMMANDS = (
    *([], ["shard"], ["verify"], ["train"], ["launch"], ["launch", "local"]),
    *(["launch", "deepspeed"], ["eval"], ["export"], ["import"], ["report"], ["demo"]),
    *(["doctor"], ["plan"], ["launch", "slurm"], ["launch", "torchrun"], ["launch", "accelerate"]),
    *(["bench"], ["bench", "infer"], ["bench", "loader"], ["fetch-coco"], ["preview"]),
)


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_answers_within_a_second(command: list[str]) -> None:
    durations_s = []
    for _ in range(3):  # the best of three: the machine may be busy with something else
        started_s = time.monotonic()
        result = subprocess.run([PROGRAM, *command, "--help"], capture_output=True, text=True)
        durations_s.append(time.monotonic() - started_s)
        assert result.returncode == 0 and result.stdout.startswith("usage: convnext-yolo")
        if durations_s[-1] < 1:
            break
    assert min(durations_s) < 1, durations_s


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with one sentence and exit code 2; gives the sentence."""

    def run(*words: object) -> str:
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's own
            code = int(stop.code or 0)
        output = capsys.readouterr()
        assert code == 2, output
        lines = [line for line in output.err.splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("convnext-yolo"), output.err
        assert ": error: " in lines[0]
        return lines[0]

    return run


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Two pictures with a box each; the document may be spoilt and saved again."""
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7, "bbox": [5, 5, 10, 10]} for i in (1, 2)
        ],
        "categories": [{"id": 7, "name": "thing"}],
    }
    for i in (1, 2):
        Image.new("RGB", (40, 30), (i, 2, 3)).save(tmp_path / f"{i}.png")
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    return path, document


def shard_words(annotations: Path) -> list[object]:
    folder = annotations.parent
    return ["shard", "--input", annotations, "--images", folder, "--output", folder / "out"]


def _no_image(path: Path, document: dict[str, Any]) -> None:
    (path.parent / "2.png").unlink()


def _outside(path: Path, document: dict[str, Any]) -> None:
    document["annotations"][1]["bbox"] = [35, 5, 10, 10]


def _unknown_category(path: Path, document: dict[str, Any]) -> None:
    document["annotations"][1]["category_id"] = 8


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (_no_image, ["2.png"]),
        (_outside, ["annotation 2", "35, 5, 10, 10", "40x30"]),
        (_unknown_category, ["annotation 2", "8"]),
    ],
)
def test_bad_annotations(
    coco: tuple[Path, dict[str, Any]],
    fails: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    spoil: Any,
    parts: list[str],
) -> None:
    path, document = coco
    spoil(path, document)
    path.write_text(json.dumps(document))
    before = sorted(p.name for p in path.parent.iterdir())
    sentence = fails(*shard_words(path), "--strict")
    assert all(part in sentence for part in parts), sentence
    assert sorted(p.name for p in path.parent.iterdir()) == before  # nothing half-written
    assert main([str(word) for word in shard_words(path)]) == 0  # repaired, or left out
    printed = capsys.readouterr().out
    assert all(part in printed for part in parts) and "report.json" in printed, printed


def test_shard_and_verify(
    coco: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    fails: Callable[..., str],
) -> None:
    path, _ = coco
    assert main([str(word) for word in shard_words(path)]) == 0
    shards = path.parent / "out"
    assert "2 samples, 2 boxes, 1 classes in 1 shard(s)" in capsys.readouterr().out
    assert main(["verify", str(shards)]) == 0
    capsys.readouterr()
    tar = next(shards.glob("*.tar"))
    tar.write_bytes(tar.read_bytes().replace(b"IHDR", b"IHDX"))
    assert tar.name in fails("verify", shards)


def test_shard_from_other_formats_and_to_a_url(
    coco: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    fails: Callable[..., str],
) -> None:
    folder = coco[0].parent
    (folder / "1.txt").write_text("0 0.25 0.25 0.25 0.25")
    (folder / "names.txt").write_text("thing")
    words = ["shard", "--format", "yolo", "--input", folder, "--images", folder]
    words += ["--output", f"file://{folder}/yolo", "--scratch", folder / "scratch"]
    assert "--classes" in fails(*words)
    words += ["--classes", folder / "names.txt"]
    assert main([str(word) for word in words]) == 0
    assert "yolo: 2 samples, 1 boxes, 1 classes in 1 shard(s)" in capsys.readouterr().out
    assert main(["verify", str(folder / "yolo")]) == 0

    words = ["shard", "--format", "voc", "--input", folder, "--images", folder]
    assert "has no XML file" in fails(*words, "--output", folder / "voc")
    (folder / "1.xml").write_text("<annotation><filename>1.png</filename></annotation>")
    assert "no object has a name" in fails(*words, "--output", folder / "voc")


def recipe_at(folder: Path, **sections: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run": str(folder / "run"), **sections}))
    return path


def test_wrong_recipe_key(tmp_path: Path, fails: Callable[..., str]) -> None:
    recipe = recipe_at(tmp_path, optimizer={"learning_rate": 1})
    for command in (["train"], ["launch", "local"]):
        sentence = fails(*command, "--config", recipe)
        assert f"{recipe}: unknown key optimizer.learning_rate; " in sentence
    assert "--optimizer.lr" in fails("train", "--config", "quickstart", "--optimizer.lr", "fast")
    assert not (tmp_path / "run").exists()


def test_missing_and_empty_shards(tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        recipe = recipe_at(tmp_path, data={"train": str(tmp_path / name)})
        assert str(tmp_path / name) in fails("train", "--config", recipe)
        assert str(tmp_path / name) in fails("verify", tmp_path / name)
    assert not (tmp_path / "run").exists()
    assert "RANK" not in os.environ  # later processes of ours are no ranks


def test_missing_weights_and_runs(
    tmp_path: Path, coco: tuple[Path, dict[str, Any]], fails: Callable[..., str]
) -> None:
    absent = tmp_path / "absent.safetensors"
    assert str(absent) in fails("demo", "--weights", absent)
    data = ["--data", coco[0], "--images", tmp_path]
    result = tmp_path / "results.json"
    assert str(absent) in fails("eval", "--weights", absent, *data, "--output", result)
    assert not result.exists()
    (tmp_path / "run").mkdir()
    assert "no checkpoint" in fails("export", tmp_path / "run", "--output", absent)
    assert not absent.exists()
    assert str(tmp_path / "nowhere") in fails("report", tmp_path / "nowhere", "--output", tmp_path)


def test_wrong_options(fails: Callable[..., str]) -> None:
    assert "--inptu" in fails("shard", "--input", "a", "--images", "b", "--output", "c", "--inptu")
    assert "--config" in fails("train")
    assert "invalid choice: 'shrad'" in fails("shrad")
    assert "whole number" in fails("launch", "local", "--config", "quickstart", "--processes", "0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_unwinds_a_command(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it was writing goes; a scheduler's warning while the doctor looks is no failure."""

    def asked(*_: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("convnext_yolo.launch.launch_parser.ask_about_launch", asked)
    handlers = {n: signal.getsignal(n) for n in ENDS}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may be under nohup
    try:
        assert main(["launch", "local", "--config", "quickstart"]) == 130
        assert capsys.readouterr().err == "convnext-yolo launch local: interrupted\n"
    finally:
        signal.signal(signal.SIGHUP, before)
    assert {n: signal.getsignal(n) for n in ENDS} == handlers


def test_other_ranks_leave_a_mistake_to_the_main_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their end would be the main rank's, with its sentence unsaid; alone, they say it."""
    mistaken = ["train", "--config", "quickstart", "--batch.micro", "0"]
    waited_s = []

    def is_ended_by_the_launcher(duration_s: float) -> None:
        waited_s.append(duration_s)
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", is_ended_by_the_launcher)
    assert main(mistaken) == 2 and capsys.readouterr().err == ""
    assert waited_s[0] > COLLECT_S  # by when a supervised job's ranks are ended
    monkeypatch.setattr("time.sleep", waited_s.append)
    assert main(mistaken) == 2 and "batch.micro" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert main(mistaken) == 2 and "batch.micro" in capsys.readouterr().err
    assert len(waited_s) == 2
