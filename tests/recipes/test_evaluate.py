"""The way from shards through a detector to COCO's numbers, on one process and on several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from convnext_yolo.data_prep.formats import Category
from convnext_yolo.data_prep.reader import Sample
from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.weights import WeightsInfo, save_weights
from convnext_yolo.recipes.build import architecture
from convnext_yolo.recipes.coco import METRICS
from convnext_yolo.recipes.evaluate import EvalSettings, Evaluation, evaluate, open_data
from convnext_yolo.recipes.load import load_recipe

from .forkserver import ForkServer

SETTINGS = EvalSettings(frame_px=(96, 128), batch=2, workers=0, confidence=0.1, iou=0.6)


class Painted:
    """Black pictures of many shapes, in each a red rectangle; a crowd box in every other one."""

    classes = (Category(4, "thing"),)

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def decode(self, position: int) -> Sample:
        height, width = ((96, 128), (48, 64), (192, 100), (80, 128))[position % 4]
        box = [8, 8 + 4 * (position % 3), 48, 40]
        image = np.zeros((height, width, 3), np.uint8)
        image[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
        boxes = np.array([box, [0, 0, width, height]], np.float32)[: 1 + position % 2]
        crowd = np.array([False, True])[: 1 + position % 2]
        labels = np.zeros(len(boxes), np.int64)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        return Sample(image, boxes, labels, crowd, area, image_id=100 - position)

    def sizes_px(self) -> np.ndarray:
        return np.array([self.decode(i).image.shape[1::-1] for i in range(self.count)])


class FindsRed:
    """A detector that is never wrong: one box a picture, round what is red."""

    head = None

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, images: torch.Tensor) -> Any:
        self.seen.append(tuple(images.shape))
        found = []
        for image in images:
            rows, columns = (image[0] > 127).nonzero(as_tuple=True)
            corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            found.append(torch.stack(corners).float())
        return SimpleNamespace(levels=torch.stack(found))

    def decode(self, raw: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return raw.levels[:, None], torch.full((len(raw.levels), 1, 1), 0.9)


def count_targets(head: None, levels: torch.Tensor, targets: Any) -> dict[str, torch.Tensor]:
    """A loss: the mean of the numbers of targets."""
    return {"box": torch.tensor(len(targets.label) / len(levels))}


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate remembers its processes for ever."""
    from accelerate import PartialState

    before = dict(PartialState._shared_state)
    PartialState._shared_state.clear()
    yield
    PartialState._shared_state.clear()
    PartialState._shared_state.update(before)


def run(count: int, settings: EvalSettings, detector: FindsRed) -> Evaluation | None:
    return evaluate(
        detector,  # type: ignore[arg-type]
        Painted(count),
        settings,
        torch.device("cpu"),
        count_targets,  # type: ignore[arg-type]
    )


# Pictures of 80x128, 48x64, 96x128 and 100x192, of these the first ones twice; two in a batch.
RECT = [(2, 3, 128, 160), (2, 3, 128, 160), (2, 3, 128, 160), (1, 3, 128, 96)]


@pytest.mark.parametrize(
    ("letterbox", "shapes"),
    [("square", [(2, 3, 96, 128)] * 3 + [(1, 3, 96, 128)]), ("rect", RECT)],
)
def test_a_perfect_detector_scores_one(letterbox: Any, shapes: list[tuple[int, ...]]) -> None:
    detector = FindsRed()
    outcome = run(7, replace(SETTINGS, letterbox=letterbox), detector)
    assert detector.seen == shapes
    assert outcome is not None
    assert {*METRICS, "per_class"} == set(outcome.results)
    # Only small and medium ones are there.
    assert [outcome.results[name] for name in METRICS] == pytest.approx(
        [1] * 5 + [-1] + [1] * 5 + [-1]
    )
    assert outcome.results["per_class"]["thing"] == {
        "AP": pytest.approx(1),
        "AP50": pytest.approx(1),
    }
    assert outcome.losses == {"box": pytest.approx(1)}  # one a picture: the crowd is no target


@pytest.mark.process
def test_a_rank_without_pictures_changes_nothing(
    fork_server: ForkServer, datasets: Path, tmp_path: Path
) -> None:
    """Three processes and two pictures; test_quickstart.py has trained weights on all of them."""
    cells = json.loads((datasets / "bccd/instances_val.json").read_text())
    cells["images"] = cells["images"][:2]
    ids = {image["id"] for image in cells["images"]}
    cells["annotations"] = [a for a in cells["annotations"] if a["image_id"] in ids]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    design = architecture(load_recipe([], ["--model.backbone.name", "test_convnext"]), 3)
    torch.manual_seed(0)
    weights = build_detector(design).state_dict()
    names = tuple({"id": c["id"], "name": c["name"]} for c in cells["categories"])
    save_weights(tmp_path / "w.safetensors", weights, WeightsInfo(design, names, (96, 128)))

    words = ["-m", "convnext_yolo.launch", "eval", "--weights", str(tmp_path / "w.safetensors")]
    words += ["--data", str(tmp_path / "cells.json")]
    words += ["--images", str(datasets / "bccd/images/val"), "--output"]
    for ranks in (1, 3):
        fork_server.run(ranks, *words, str(tmp_path / str(ranks)))
    assert json.loads((tmp_path / "1").read_text()) == json.loads((tmp_path / "3").read_text())


def test_data_is_shards_or_a_json_with_its_pictures(tmp_path: Path) -> None:
    from convnext_yolo.data_prep.errors import DataError

    for path in (tmp_path / "instances.json", tmp_path / "absent"):
        with pytest.raises(DataError, match=str(path)):
            open_data(path, None)
