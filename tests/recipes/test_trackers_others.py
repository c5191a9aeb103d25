"""Comet's archives and TensorBoard's event files, written by the libraries themselves."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.tracking import Tracker, pictures_path


def session(folder: Path, option: str, mode: str, steps: range, ids: dict[str, str]) -> Tracker:
    """A session of a run, with an evaluation at each multiple of four."""
    recipe = load_recipe([], ["--tracking.wandb", "off", option, mode])
    tracker = Tracker(recipe, folder, steps.start - 1, ids)
    for step in steps:
        tracker.log({"kind": "train", "step": step, "box": step / 2})
        if step % 4 == 0:
            tracker.log({"kind": "val", "step": step, "AP": 0.5})
            path = pictures_path(folder, step)
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (40, 30)).save(path)
            tracker.log_evaluation(step, {"RBC": {"AP": 0.5}}, [path])
    weights = folder / "weights.safetensors"
    weights.write_bytes(b"weights")
    tracker.log_weights(weights)
    tracker.close()
    return tracker


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    session(tmp_path, "--tracking.tensorboard", "true", range(1, 7), {})
    session(tmp_path, "--tracking.tensorboard", "true", range(5, 9), {})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/box")] == [
        (step, step / 2) for step in range(1, 9)
    ]
    assert [e.step for e in events.Scalars("val/AP")] == [4, 8]
    assert [e.step for e in events.Images("val/predictions")] == [4, 8]
    assert "val/per_class/text_summary" in events.Tags()["tensors"]


def test_tensorboard_that_is_turned_on_late_has_it_all(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    session(tmp_path, "--tracking.tensorboard", "false", range(1, 5), {})
    session(tmp_path, "--tracking.tensorboard", "true", range(5, 7), {})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/box")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Images("val/predictions")] == [4]


@pytest.mark.process
def test_comet_holds_each_step_once_in_archives_of_one_experiment(tmp_path: Path) -> None:
    pytest.importorskip("comet_ml")
    tracker = session(tmp_path, "--tracking.comet", "offline", range(1, 7), {})
    key = tracker.run_ids["comet"]
    (tmp_path / "comet" / f"{key}-killed.zip").write_bytes(b"PK\5\6" + bytes(18))  # as Comet does
    again = session(tmp_path, "--tracking.comet", "offline", range(5, 9), tracker.run_ids)
    assert again.run_ids == {"comet": key}
    points, uploads = [], []
    for archive in (tmp_path / "comet").glob(f"{key}-*.zip"):
        with zipfile.ZipFile(archive) as file:
            lines = file.read("messages.json").splitlines() if file.namelist() else []
        for message in map(json.loads, lines):
            if message["type"] == "file_upload":
                about = message["payload"]["additional_params"]
                uploads.append(about.get("fileName") or about["figName"])
            if message["type"] == "metric_msg":
                metric = message["payload"]["metric"]
                points.append((metric["metricName"], metric["step"]))
    assert sorted(points) == [
        *(("train/box", step) for step in range(1, 9)),
        *(("val/AP", step) for step in (4, 8)),
    ]
    assert sorted(uploads) == [
        *("val/per_class-4.csv", "val/per_class-8.csv", "val/predictions", "val/predictions"),
        *("weights.safetensors", "weights.safetensors"),  # of each session
    ]
