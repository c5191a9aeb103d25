"""Detections as data: the answer of the API, COCO JSON, counts."""

from collections.abc import Sequence
from typing import Any

from convnext_yolo.model.postprocess import Detections
from convnext_yolo.model.weights import WeightsInfo


def class_names(info: WeightsInfo) -> list[str]:
    """Names of the classes in index order."""
    return [str(entry["name"]) for entry in info.classes]


def describe_model(info: WeightsInfo) -> dict[str, Any]:
    """What the model is: backbone, architecture, step, classes, input, hash."""
    backbone = info.architecture.get("backbone", {}).get("name")
    return {
        "name": backbone or info.architecture.get("name", "unknown"),
        "architecture": info.architecture.get("name", "unknown"),
        "step": info.step,
        "classes": list(info.classes),
        "image_px": list(info.image_px),  # height, width
        "metrics": info.metrics,
        "sha256": info.sha256,
    }


def detection_records(found: Detections, info: WeightsInfo) -> list[dict[str, Any]]:
    """COCO's result records, best first: category, score, `bbox` [x, y, width, height] in px."""
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [
        {
            "category_id": info.classes[label]["id"],
            "category": info.classes[label]["name"],
            "score": round(score, 5),
            "bbox": [round(v, 2) for v in (left, top, right - left, bottom - top)],
        }
        for (left, top, right, bottom), score, label in rows
    ]


def detect_answer(
    found: Detections, width_px: int, height_px: int, info: WeightsInfo
) -> dict[str, Any]:
    """What the API endpoint `/detect` returns."""
    return {
        "image": {"width": width_px, "height": height_px},
        "detections": detection_records(found, info),
        "model": describe_model(info),
    }


def coco_document(
    found: Detections,
    file_name: str,
    size_px: tuple[int, int],
    info: WeightsInfo,
    confidence: float,
    iou: float,
) -> dict[str, Any]:
    """A whole COCO data set of one picture, its annotations with scores; `pycocotools` reads it.

    Args:
        size_px: width and height of the picture.
        confidence, iou: the thresholds that gave `found`.
    """
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": record["category_id"],
            "bbox": record["bbox"],
            "area": round(record["bbox"][2] * record["bbox"][3], 2),
            "iscrowd": 0,
            "segmentation": [],
            "score": record["score"],
        }
        for number, record in enumerate(detection_records(found, info), 1)
    ]
    model = describe_model(info)
    return {
        "info": {
            "description": "Detections of ConvNeXt-YOLO",
            "model": {key: model[key] for key in ("name", "architecture", "step", "sha256")},
            "confidence": confidence,
            "iou": iou,
        },
        "images": [{"id": 1, "file_name": file_name, "width": size_px[0], "height": size_px[1]}],
        "categories": [{"id": c["id"], "name": c["name"]} for c in info.classes],
        "annotations": annotations,
    }


def class_counts(found: Detections, classes: int) -> Sequence[int]:
    """Number of boxes of each class, in index order."""
    return found.labels.bincount(minlength=classes).tolist()
