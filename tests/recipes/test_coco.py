"""COCO's numbers against pycocotools' own, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convnext_yolo.data_prep.batch import Truth
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.formats import Category
from convnext_yolo.recipes.coco import METRICS, coco_metrics, match_classes

CLASSES = (Category(3, "cat"), Category(7, "dog"))


def truth(image_id: int, boxes: list[list[float]], labels: list[int], crowd: int = 0) -> Truth:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    area = (array[:, 2:] - array[:, :2]).prod(1)
    crowds = np.full(len(labels), bool(crowd))
    return Truth(image_id, 200, 200, array, np.array(labels, np.int64), crowds, area)


def rows(*values: tuple[float, ...]) -> np.ndarray:
    return np.array(values, np.float32).reshape(-1, 6)


def test_only_pycocotools_is_silenced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What another thread says meanwhile is heard."""
    from pycocotools.cocoeval import COCOeval

    evaluate = COCOeval.evaluate

    def says(self: Any) -> None:
        print("step 7 is saved")
        evaluate(self)

    monkeypatch.setattr(COCOeval, "evaluate", says)
    test_perfect_detections_score_one()
    assert capsys.readouterr().out == "step 7 is saved\n"


def test_perfect_detections_score_one() -> None:
    boxes = [[10, 10, 60, 60], [80, 80, 190, 190]]
    found = rows((10, 10, 60, 60, 0.9, 0), (80, 80, 190, 190, 0.8, 1))
    results = coco_metrics([(truth(5, boxes, [0, 1]), found)], CLASSES)
    assert [results[name] for name in ("AP", "AP50", "AR_100")] == pytest.approx([1, 1, 1])
    assert results["AP_small"] == -1  # there are none
    assert results["per_class"] == {
        "cat": {"AP": pytest.approx(1), "AP50": pytest.approx(1)},
        "dog": {"AP": pytest.approx(1), "AP50": pytest.approx(1)},
    }


def test_a_missed_class_and_the_threshold_between() -> None:
    boxes = [[0, 0, 100, 100], [0, 0, 50, 50]]
    found = rows((0, 0, 100, 72, 0.9, 0))  # IoU .72: found at .5, .55, .6, .65, .7
    results = coco_metrics([(truth(5, boxes, [0, 1]), found)], CLASSES)
    assert results["per_class"]["cat"] == {"AP": pytest.approx(0.5), "AP50": pytest.approx(1)}
    assert results["per_class"]["dog"] == {"AP": 0.0, "AP50": 0.0}
    assert results["AP"] == pytest.approx(0.25) and results["AP75"] == 0


def test_nothing_found() -> None:
    results = coco_metrics([(truth(5, [[0, 0, 9, 9]], [0]), rows())], CLASSES)
    larger = {"AP_medium", "AP_large", "AR_medium", "AR_large"}  # none to find, as for dogs
    assert {name: results[name] for name in METRICS} == {
        name: -1 if name in larger else 0 for name in METRICS
    }
    assert results["per_class"] == {"cat": {"AP": 0, "AP50": 0}, "dog": {"AP": -1, "AP50": -1}}


def test_nothing_to_find() -> None:
    for found in (rows(), rows((0, 0, 9, 9, 0.9, 0))):
        results = coco_metrics([(truth(5, [], []), found)], CLASSES)
        assert all(results[name] == -1 for name in METRICS)


def test_a_crowd_is_neither_missed_nor_a_mistake() -> None:
    pictures = [
        (truth(1, [[0, 0, 100, 100]], [0]), rows((0, 0, 100, 100, 0.9, 0))),
        (truth(2, [[0, 0, 100, 100]], [0], crowd=1), rows((10, 10, 50, 50, 0.95, 0))),
    ]
    assert coco_metrics(pictures, CLASSES)["per_class"]["cat"]["AP"] == pytest.approx(1)


def test_classes_are_matched_by_name() -> None:
    model = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}, {"id": 3, "name": "cat"}]
    assert match_classes(model, CLASSES) == [7, -2, 3]
    with pytest.raises(DataError, match=r"class 'dog', which these weights do not know"):
        match_classes(model[1:], CLASSES)
    found = rows((0, 0, 50, 50, 0.9, 0))  # the model's class 0 is the data's dog
    pictures = [(truth(1, [[0, 0, 50, 50]], [1]), found)]
    results = coco_metrics(pictures, CLASSES, match_classes(model, CLASSES))
    assert results["per_class"]["dog"]["AP"] == pytest.approx(1)


def test_the_published_pair(shared_data: Path) -> None:
    """pycocotools' sample annotations and detections, and the numbers known for them."""
    folder = shared_data / "cocoeval"
    document = json.loads((folder / "instances_val2014_100.json").read_text())
    detections = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    classes = [Category(c["id"], c["name"]) for c in document["categories"]]
    label = {c.id: i for i, c in enumerate(classes)}
    by_image: dict[int, tuple[list[Any], list[Any]]] = {}
    for image in document["images"]:
        by_image[image["id"]] = ([], [])
    for annotation in document["annotations"]:
        by_image[annotation["image_id"]][0].append(annotation)
    for detection in detections:
        if detection["image_id"] in by_image:
            by_image[detection["image_id"]][1].append(detection)

    def xyxy(entry: dict[str, Any]) -> list[float]:
        x, y, w, h = entry["bbox"]
        return [x, y, x + w, y + h]

    pictures = []
    for image in document["images"]:
        known, found = by_image[image["id"]]
        pictures.append(
            (
                Truth(
                    image["id"],
                    image["width"],
                    image["height"],
                    np.array([xyxy(a) for a in known]).reshape(-1, 4),
                    np.array([label[a["category_id"]] for a in known], np.int64),
                    np.array([bool(a["iscrowd"]) for a in known], bool),
                    np.array([a["area"] for a in known]),
                ),
                np.array([[*xyxy(d), d["score"], label[d["category_id"]]] for d in found]),
            )
        )
    results = coco_metrics(pictures, classes)
    expected = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    assert [results[name] for name in METRICS] == pytest.approx(expected, abs=6e-4)
