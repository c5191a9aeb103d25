"""COCO's numbers: pycocotools on annotations and detections, per class too."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..data_prep.batch import Truth
from ..data_prep.errors import DataError
from ..data_prep.formats import Category

METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)


def format_results(results: dict[str, Any]) -> str:
    """The numbers as a table."""
    lines = [f"{name:<10} {results[name]:.4f}" for name in METRICS]
    width = max(10, *(len(name) for name in results["per_class"]))
    lines.append(f"{'class':<{width}} AP      AP50")
    for name, row in results["per_class"].items():
        lines.append(f"{name:<{width}} {row['AP']:.4f}  {row['AP50']:.4f}")
    return "\n".join(lines)


def coco_metrics(
    pictures: Sequence[tuple[Truth, np.ndarray]],
    classes: Sequence[Category],
    class_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """pycocotools on annotations and detections.

    Args:
        pictures: annotations of a picture, and its detections `[N, 6]`: xyxy, score, class.
        classes: categories of the annotations by class index.
        class_ids: category id of a detection's class index; by default as the annotations'.

    Returns:
        The twelve numbers (-1 where there is nothing to find) and `per_class`: AP and AP50 by name.
    """
    from pycocotools import coco, cocoeval
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # They tell of every step. Not by redirecting the process's output: an evaluation that is broken
    # off goes on for a while, in its thread, beside what we have to say.
    for module in (coco, cocoeval):
        module.print = _silent
    ids = [category.id for category in classes]
    truth = COCO()
    truth.dataset = _coco_truth([t for t, _ in pictures], classes)
    rows = [_coco_results(t.image_id, r, class_ids or ids) for t, r in pictures]
    results = [row for part in rows for row in part]
    truth.createIndex()
    found = COCO()
    if results:
        found = truth.loadRes(results)
    else:  # which loadRes does not take
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics: dict[str, Any] = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # [IoU, recall, class], all areas
    metrics["per_class"] = {
        category.name: {
            "AP": _mean(precision[:, :, evaluation.params.catIds.index(category.id)]),
            "AP50": _mean(precision[0, :, evaluation.params.catIds.index(category.id)]),
        }
        for category in classes
    }
    return metrics


def _silent(*_: object, **__: object) -> None:
    """Instead of `print`."""


def match_classes(model: Sequence[dict[str, Any]], data: Sequence[Category]) -> list[int]:
    """Category ids of the data set for the detector's class indices, matched by name.

    A class that the data set does not have gets an id that it does not use.

    Raises:
        DataError: the data set has a class that the detector has not learnt.
    """
    by_name = {category.name: category.id for category in data}
    known = {str(c["name"]) for c in model}
    unknown = [name for name in by_name if name not in known]
    if unknown:
        raise DataError(
            f"the data has class {unknown[0]!r}, which these weights do not know (they know "
            f"{', '.join(sorted(known)[:8])}{', …' if len(known) > 8 else ''}); "
            "take the weights of a run on this data"
        )
    return [by_name.get(str(c["name"]), -1 - i) for i, c in enumerate(model)]


def _coco_truth(pictures: Sequence[Truth], classes: Sequence[Category]) -> dict[str, Any]:
    """The annotations in COCO's own form."""
    annotations: list[dict[str, Any]] = []
    for t in pictures:
        for box, label, crowd, area in zip(t.boxes_xyxy, t.labels, t.crowd, t.area, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": t.image_id,
                    "category_id": classes[label].id,
                    "bbox": _xywh(box),
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    return {
        "images": [
            {"id": t.image_id, "width": t.width_px, "height": t.height_px} for t in pictures
        ],
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name} for c in classes],
    }


def _coco_results(
    image_id: int, rows: np.ndarray, class_ids: Sequence[int]
) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {
            "image_id": image_id,
            "category_id": class_ids[int(row[5])],
            "bbox": _xywh(row),
            "score": float(row[4]),
        }


def _xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = map(float, box[:4])
    return [x1, y1, x2 - x1, y2 - y1]


def _mean(precision: np.ndarray) -> float:
    """Mean over what is there; pycocotools marks what is not by -1."""
    valid = precision[precision > -1]
    return float(valid.mean()) if len(valid) else -1.0
