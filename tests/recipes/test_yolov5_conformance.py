"""YOLOv5n with its published weights, imported: upstream's raw maps and its AP.

The weights, the pictures and upstream's numbers lie beside the repository on the developers'
machines only; README.md there says how they came about.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convnext_yolo.model.boxes import xyxy_to_cxcywh
from convnext_yolo.model.detector import Detector
from convnext_yolo.model.weights import WeightsInfo, load_detector
from convnext_yolo.model.yolov5_import import COCO_IDS, import_yolov5

SHARED = Path(__file__).resolve().parents[3] / "shared"
WEIGHTS = SHARED / "weights" / "coco_yolov5n.fp16.safetensors"
NUMBERS = SHARED / "reference" / "yolov5n_two_images_320.safetensors"
COCO = SHARED / "data" / "coco_cc_val100"

pytestmark = pytest.mark.skipif(
    not (WEIGHTS.is_file() and NUMBERS.is_file() and COCO.is_dir()),
    reason="needs ../shared (weights, reference, data), which is not part of the project",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("yolov5n") / "yolov5n.safetensors"
    import_yolov5(WEIGHTS, "yolov5n", path)
    return path


@pytest.fixture(scope="module")
def imported(weights: Path) -> tuple[Detector, WeightsInfo]:
    return load_detector(weights)


def test_what_comes_along(imported: tuple[Detector, WeightsInfo]) -> None:
    detector, info = imported
    assert tuple(c["id"] for c in info.classes) == COCO_IDS
    assert info.classes[0] == {"id": 1, "name": "person"}
    assert detector.head.anchors[1].tolist() == [[30, 61], [62, 45], [59, 119]]
    assert sum(p.numel() for p in detector.parameters()) == 1_872_157
    assert {t.dtype for t in detector.state_dict().values()} == {torch.float32, torch.int64}


@torch.no_grad()
def test_raw_maps_and_decoded_predictions(imported: tuple[Detector, WeightsInfo]) -> None:
    detector, _ = imported
    want = load_file(NUMBERS)
    raw = detector(want["images_u8"])
    for level, name in zip(raw.levels, ("raw_p3", "raw_p4", "raw_p5"), strict=True):
        torch.testing.assert_close(level, want[name], rtol=0, atol=1e-4)
    boxes, scores = detector.decode(raw)
    decoded = want["decoded"]  # cx, cy, width, height in pixels; objectness; classes
    # Sides go up to 1,500 px, where a logit's last bits are more than 1e-4 px.
    torch.testing.assert_close(xyxy_to_cxcywh(boxes), decoded[..., :4], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scores, decoded[..., 4:5] * decoded[..., 5:], rtol=0, atol=1e-5)


@pytest.mark.process
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("letterbox", "ap"), [("rect", 0.3584), ("square", 0.3521)])
def test_average_precision(weights: Path, tmp_path: Path, letterbox: str, ap: float) -> None:
    words = ["--data", COCO / "instances.json", "--images", COCO / "images"]
    words += ["--letterbox", letterbox, "--output", tmp_path / "results.json"]
    program = Path(sys.executable).with_name("convnext-yolo")
    subprocess.run([program, "eval", "--weights", weights, *words], check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["AP"] == pytest.approx(ap, abs=0.003)
    if letterbox == "rect":
        assert results["AP50"] == pytest.approx(0.5938, abs=0.005)
