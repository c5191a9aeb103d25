"""metrics.jsonl after kills and resumes, and W&B beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convnext_yolo.recipes.config import Recipe
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.tracking import Tracker, read_metrics


def quiet() -> Recipe:
    return load_recipe([], ["--tracking.wandb", "off"])


def record(step: int) -> dict[str, object]:
    return {"kind": "train", "step": step, "box": step / 10}


def test_a_resume_drops_what_it_repeats(tmp_path: Path) -> None:
    tracker = Tracker(quiet(), tmp_path, 0, None)
    for step in range(1, 7):
        tracker.log(record(step))
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a kill in the middle of a line
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    tracker = Tracker(quiet(), tmp_path, 4, None)  # from the checkpoint of step 4
    tracker.log(record(5))
    assert read_metrics(tmp_path) == [record(step) for step in range(1, 6)]  # on disk at once
    tracker.close()


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    Tracker(quiet(), tmp_path, 0, None).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.process
def test_wandb_writes_offline_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    recipe = load_recipe([], ["--tracking.wandb", "offline"])
    tracker = Tracker(recipe, tmp_path, 0, None)
    tracker.log(record(1))
    tracker.close()
    assert os.environ["WANDB_MODE"] == "offline"
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert tracker.run_id and run.name.endswith(tracker.run_id)
    assert list(run.glob("*.wandb"))


def test_a_tracker_that_fails_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, numbers: object) -> None:
            raise RuntimeError("no space")

    tracker = Tracker(quiet(), tmp_path, 0, None)
    tracker._wandb = Broken()
    tracker.log(record(1))
    tracker.log(record(2))
    tracker.close()
    assert capsys.readouterr().err.count("W&B stopped: no space; metrics.jsonl goes on") == 1
    assert len(read_metrics(tmp_path)) == 2
