"""`bench step`: its table, its figures of real ranks, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from convnext_yolo.launch.cli import main
from convnext_yolo.recipes import bench_ranks
from convnext_yolo.recipes.bench_step import format_step, report
from convnext_yolo.recipes.clock import PHASES
from convnext_yolo.recipes.config import Recipe

from .conftest import environment, processes_with

PARAMETERS = 2_008_248  # of the model below


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A small model, whose shards do not exist."""
    sections = {
        "model": {"backbone": {"name": "test_convnext", "pretrained": True}},
        "data": {"train": "none", "val": "none", "image_px": [64, 96], "workers": 0},
        "batch": {"global": 4, "micro": 2},
        "tracking": {"wandb": "online"},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def found(step_s: float, state: list[int], memory_mib: list[float] | None) -> dict[str, Any]:
    parts = dict.fromkeys((*PHASES, "rest"), step_s / 6)
    return {
        **{"device": "cpu", "step_s": step_s, "parts_s": parts},
        **{"optimizer_state_bytes": state, "peak_memory_mib": memory_mib},
    }


def test_ratios_are_to_the_first_stage() -> None:
    recipe = Recipe.model_validate({"batch": {"global": 8, "micro": 4}})
    several = [found(0.5, [2**21, 2**21], [800, 900]), found(1.0, [2**20, 2**19], [450, 300])]
    made = report(recipe, [1, 3], 2, several)
    assert [s.stage for s in made.stages] == [1, 3]
    assert [s.relative_step for s in made.stages] == [1, 2]
    assert [s.relative_optimizer_state for s in made.stages] == [1, 0.5]  # of the fullest rank
    assert [s.relative_memory for s in made.stages] == [1, 0.5]
    assert [s.images_per_s for s in made.stages] == [16, 8]
    lines = format_step(made).splitlines()
    assert "relative to ZeRO-1" in lines[0]
    assert lines[2].split()[:4] == ["1", "500.0", "1.00", "16.00"]
    assert lines[3].split()[:4] == ["3", "1000.0", "2.00", "8.00"]
    assert lines[3].split("|")[2].split() == ["1.0", "0.50"]


def test_a_memory_that_is_not_known_is_a_dash() -> None:
    made = report(Recipe(), [0, 1], 1, [found(1, [4], [5]), found(1, [4], None)])
    assert made.stages[1].relative_memory is None
    assert format_step(made).splitlines()[3].endswith("-     -")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stages", "4"], "invalid choice: 4"),
        (["--processes", "0"], "'0' is not a whole number of at least 1"),
        (["--processes", "3"], "which 3 processes can't share equally"),
        (["--no.such", "1"], "unknown key no"),
        (["--deepspeed.options", "{elasticity: {}}"], "deepspeed.options.elasticity"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    words: list[str], sentence: str, recipe: str, capsys: Any
) -> None:
    try:
        code = main(["bench", "step", "--config", recipe, *words])
    except SystemExit as end:  # argparse's
        code = int(str(end.code))
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_processes_of_a_launcher_are_not_chosen(monkeypatch: Any, recipe: str, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "step", "--config", recipe, "--processes", "2"]) == 2
    assert "a launcher has started the processes" in capsys.readouterr().err


@pytest.mark.process
def test_two_stages_on_two_ranks(recipe: str, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words = ["--stages", "0", "2", "--processes", "2", "--steps", "2", "--warmup", "1"]
    output = tmp_path / "b.json"
    assert main(["bench", "step", "--config", recipe, *words, "--json", str(output)]) == 0
    record = json.loads(output.read_text())
    assert (record["device"], record["processes"]) == ("cpu", 2)
    whole, shared = record["stages"]
    assert (whole["stage"], shared["stage"]) == (0, 2)
    assert whole["relative_step"] == whole["relative_memory"] == 1
    moments = 2 * 4 * PARAMETERS
    assert whole["optimizer_state_bytes"] == [moments, moments]
    assert shared["relative_optimizer_state"] == pytest.approx(0.5, rel=0.05)
    assert sum(shared["optimizer_state_bytes"]) == pytest.approx(moments, rel=0.01)
    for stage in (whole, shared):
        assert set(stage["parts_s"]) == {*PHASES, "rest"}
        assert all(seconds >= 0 for seconds in stage["parts_s"].values())
        assert stage["parts_s"]["forward"] > 0 < stage["parts_s"]["communication"]
        assert stage["images_per_s"] == pytest.approx(4 / stage["step_s"], rel=0.01)
        assert len(stage["peak_memory_mib"]) == 2 and min(stage["peak_memory_mib"]) > 100
    assert capfd.readouterr().out.count("\n") == 2 + 2 + 3  # what libraries print is not there
    assert {path.name for path in tmp_path.iterdir()} == {"b.json", "small.yaml"}


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_an_end_leaves_no_process(recipe: str, tmp_path: Path, number: signal.Signals) -> None:
    words = ["--stages", "1", "--processes", "2", "--steps", "100000", "--data.workers", "1"]
    command = [sys.executable, "-m", "convnext_yolo.launch", "bench", "step", "--config", recipe]
    front = subprocess.Popen(
        [*command, *words],
        env={**environment(), "TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    module, deadline_s = "convnext_yolo.recipes.bench_step", time.monotonic() + 120
    while len(ours(module, tmp_path)) < 4:  # two ranks, each with a process that loads
        assert front.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.05)  # between two looks
    os.kill(front.pid, number)
    assert front.wait(timeout=30) in (130, -signal.SIGKILL)
    while ours(module, tmp_path):
        assert time.monotonic() < deadline_s, ours(module, tmp_path)
        time.sleep(0.05)
    if number == signal.SIGTERM:
        assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def ours(module: str, folder: Path) -> list[str]:
    """Command lines of living ranks whose recipe is below a folder."""
    return [line for line in processes_with(module) if str(folder) in line]


@pytest.mark.process
def test_a_rank_that_fails_is_named(recipe: str, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "no number")  # the interpreter refuses to start
    with pytest.raises(bench_ranks.BenchError, match=r"rank \d ended with exit code 1"):
        bench_ranks.measure_run("any", lambda *_: None, Recipe(), [1], 2, lambda: None)
    assert "PYTHONHASHSEED" in capfd.readouterr().err
