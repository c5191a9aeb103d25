"""ONNX: in onnxruntime the same boxes as the predictor's, suppressed outside and inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from convnext_yolo.launch.cli import main
from convnext_yolo.model.detector import Detector, build_detector
from convnext_yolo.model.letterbox import letterbox
from convnext_yolo.model.norms import micro_batch_norms
from convnext_yolo.model.postprocess import MAX_DETECTIONS
from convnext_yolo.model.predictor import Predictor
from convnext_yolo.model.weights import WeightsInfo, save_weights
from convnext_yolo.recipes import export, onnx_export
from convnext_yolo.recipes.config_model import COCO_ANCHORS
from convnext_yolo.recipes.onnx_export import (
    ExportError,
    Suppression,
    difference_px,
    export_onnx,
    trace,
    with_suppression,
)

IMAGE_PX = (64, 96)
CLASSES = tuple({"id": 10 * i, "name": name} for i, name in enumerate(("cat", "dog", "émeu")))
TIMM = {"name": "test_convnext"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "yolov5": {"depth": 0.33, "width": 0.125, "anchors": COCO_ANCHORS},
    "seed_convnext_yolo": {
        "backbone": TIMM,
        "adapter_channels": [16, 24, 32],
        "neck_channels": [8, 16, 24],
        "neck_repeats": 1,
        "anchors": COCO_ANCHORS,
    },
    "convnext_yolo": {
        "backbone": TIMM,
        "neck_channels": [16, 24, 32],
        "neck_repeats": 1,
        "head_channels": 16,
        "head_convs": 1,
        "distance_bins": 8,
    },
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request: pytest.FixtureRequest) -> tuple[Any, Predictor]:
    """A detector as a graph and as a predictor."""
    detector, info = opinionated(request.param)
    return trace(detector, IMAGE_PX), Predictor(detector, info, "cpu")


def opinionated(name: str) -> tuple[Detector, WeightsInfo]:
    """A detector that finds many boxes, with scores and statistics that differ as trained ones."""
    torch.manual_seed(3)
    architecture = {"name": name, "classes": len(CLASSES), **ARCHITECTURES[name]}
    detector = build_detector(architecture).eval()
    with torch.no_grad():
        for norm in micro_batch_norms(detector):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
        for key, parameter in detector.head.named_parameters():
            if key.startswith(("convs", "cls_convs", "box_convs")):
                # Not so large that scores saturate, and many are equal.
                parameter.normal_(0, 0.6 if parameter.ndim > 1 else 0.3)
    return detector, WeightsInfo(architecture, CLASSES, IMAGE_PX)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    sizes = [(40, 90), (120, 75), IMAGE_PX][:count]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def run(model: Any, images: list[np.ndarray]) -> list[np.ndarray]:
    """What onnxruntime makes of letterboxed pictures."""
    frames = np.stack([letterbox(image, *IMAGE_PX)[0] for image in images])
    inputs = {"images": frames.transpose(0, 3, 1, 2).astype(np.float32) / 255}
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs: list[np.ndarray] = session.run(None, inputs)
    return outputs


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_decoded_predictions_are_the_predictors(
    exported: tuple[Any, Predictor], batch: int
) -> None:
    model, predictor = exported
    frames = np.stack([letterbox(image, *IMAGE_PX)[0] for image in pictures(batch)])
    with torch.inference_mode():
        raw = predictor.detector(torch.from_numpy(frames).permute(0, 3, 1, 2))
        expected = predictor.detector.decode(raw)
    for found, wanted in zip(run(model, pictures(batch)), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-3)
    assert difference_px(model, predictor.detector, IMAGE_PX) < 1e-3


@pytest.mark.parametrize(("confidence", "iou"), [(0.25, 0.45), (0.01, 0.98), (1.0, 0.5)])
def test_suppression_inside_is_the_predictors(
    exported: tuple[Any, Predictor], confidence: float, iou: float
) -> None:
    model, predictor = exported
    suppressing = with_suppression(model, Suppression(confidence, iou))
    onnx.checker.check_model(suppressing, full_check=True)
    counts = []
    for batch in (1, 2, 3):
        images = pictures(batch)
        (rows,) = run(suppressing, images)
        assert (np.diff(rows[:, 0]) >= 0).all()  # images in turn
        wanted = predictor(images, confidence, iou)
        for number, (image, detections) in enumerate(zip(images, wanted, strict=True)):
            own = rows[rows[:, 0] == number]
            assert (np.diff(own[:, 5]) <= 0).all()  # best first
            frame = letterbox(image, *IMAGE_PX)[1]
            boxes = frame.to_picture(torch.from_numpy(own[:, 1:5]))
            assert len(own) == len(detections)
            found = torch.cat((boxes, torch.from_numpy(own[:, 5:])), dim=1)
            expected = torch.column_stack((detections.boxes, detections.scores, detections.labels))
            # Scores that differ in their last bits only may change places, at the cut-off too.
            least = own[-1, 5] + 1e-5 if len(own) == MAX_DETECTIONS else 0
            near = torch.cdist(found, expected, p=torch.inf) < 1e-3
            assert near.any(1)[found[:, 4] > least].all()
            assert near.any(0)[expected[:, 4] > least].all()
            counts.append(len(own))
    assert {0.25: min(counts) > 5, 0.01: max(counts) == MAX_DETECTIONS, 1.0: not any(counts)}[
        confidence
    ], counts


def test_the_command_says_and_writes_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector, info = opinionated("convnext_yolo")
    weights, output = tmp_path / "w.safetensors", tmp_path / "new" / "w.onnx"
    sha256 = save_weights(weights, detector.state_dict(), info)
    command = ["export", str(weights), "--onnx", str(output)]
    assert main([*command, "--onnx-nms", "--confidence", "0.3", "--iou", "0.6"]) == 0
    said = capsys.readouterr().out
    assert "with suppression inside, 1.0 MiB; within" in said and str(output) in said
    assert list(output.parent.iterdir()) == [output]

    model = onnx.load(output)
    onnx.checker.check_model(model, full_check=True)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["classes"]) == list(CLASSES)
    assert json.loads(facts["image_px"]) == list(IMAGE_PX)
    assert (facts["sha256"], json.loads(facts["strides"])) == (sha256, [8, 16, 32])
    assert json.loads(facts["suppression"]) == {
        "confidence": 0.3,
        "iou": 0.6,
        "by_class": True,
        "max_detections": MAX_DETECTIONS,
    }
    assert facts["input"].startswith("images float32 [batch, 3, 64, 96]: RGB in [0, 1]")
    assert facts["output"].startswith("detections float32 [N, 7]: image, x1, y1, x2, y2, score")
    assert [output.name for output in model.graph.output] == ["detections"]
    # The exporter's notes name this machine's files.
    assert b".py" not in output.read_bytes()
    (rows,) = run(model, pictures(2))
    assert rows.shape[1] == 7 and rows[:, 5].min() > 0.3


def test_mistakes_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, info = opinionated("seed_convnext_yolo")
    weights, output = tmp_path / "w.safetensors", tmp_path / "w.onnx"
    save_weights(weights, detector.state_dict(), info)
    with pytest.raises(ExportError, match="--iou nan: give a number from 0 to 1"):
        Suppression(iou=float("nan"))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ExportError, match=r"pip install 'convnext-yolo\[onnx\]'"):
            export_onnx(weights, output)
    monkeypatch.setattr(onnx_export, "trace", lambda *_: None)
    with monkeypatch.context() as patched:
        patched.setattr(onnx_export, "difference_px", lambda *_: float("nan"))
        with pytest.raises(ExportError, match="nan px off PyTorch's"):
            export_onnx(weights, output)
    assert not output.exists()


def test_a_run_becomes_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(run: Path, output: Path, checkpoint: Path | None, averaged: bool) -> tuple[str, int]:
        assert (run, checkpoint, averaged) == (tmp_path, None, False)
        output.write_bytes(bytes(2**20))
        return "5a5a", 7

    def write_onnx(weights: Path, output: Path, suppression: Suppression | None) -> float:
        assert weights == tmp_path / "w" and suppression is None
        output.write_bytes(bytes(2**21))
        return 0.0002

    monkeypatch.setattr(export, "export", write)
    monkeypatch.setattr(export, "export_onnx", write_onnx)
    weights, output = tmp_path / "w", tmp_path / "o"
    command = ["export", str(tmp_path), "--output", str(weights), "--onnx", str(output)]
    assert main([*command, "--no-ema"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{weights}: weights of step 7, 1.0 MiB",
        "weights sha256 5a5a",
        f"{output}: ONNX without suppression inside, 2.0 MiB; within 0.0002 px of PyTorch in "
        "onnxruntime",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{weights}"], "is exported already"),
        (["{weights}", "--output", "x", "--onnx", "y"], "is exported already"),
        (["{weights}", "--no-ema", "--onnx", "y"], "is exported already"),
        (["{folder}", "--onnx", "y"], "--output is missing"),
        (["{folder}", "--output", "x", "--onnx-nms"], "name that too, as in --onnx W.onnx"),
    ],
)
def test_the_command_refuses(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    filled = [word.format(weights=weights, folder=tmp_path) for word in words]
    assert main(["export", *filled]) == 2
    assert sentence in capsys.readouterr().err
