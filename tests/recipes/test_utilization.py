"""What a picture costs, what a device could do, and the share that a speed is of it."""

from __future__ import annotations

import pytest
import torch

from convnext_yolo.model.detector import Detector, build_detector
from convnext_yolo.recipes.build import architecture
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.utilization import PEAK_TFLOPS, Utilization, _peak_tflops, gflops

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def detector(*words: str) -> Detector:
    with torch.device("meta"):  # counting computes nothing
        return build_detector(architecture(load_recipe([], words), 80)).eval()


def yolov5(depth: float, width: float) -> Detector:
    from convnext_yolo.model.detector import yolov5 as build

    anchors = [[[10, 13], [16, 30], [33, 23]]] * 3
    with torch.device("meta"):
        return build(80, depth, width, anchors).eval()


@pytest.mark.parametrize(
    ("depth", "width", "published"), [(0.33, 0.25, 4.5), (0.33, 0.5, 16.5), (0.67, 0.75, 49.0)]
)
def test_gflops_are_the_published_ones(depth: float, width: float, published: float) -> None:
    """YOLOv5 v6's table: n, s, m at 640 px, two operations a multiply-add."""
    assert gflops(yolov5(depth, width), (640, 640)) == pytest.approx(published, rel=0.02)


def test_gflops_grow_with_the_frame_and_leave_the_model_alone() -> None:
    model = yolov5(0.33, 0.25)
    small, large = gflops(model, (320, 320)), gflops(model, (640, 320))
    assert large == pytest.approx(2 * small, rel=1e-6)
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "half", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 495),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", 835, 418),
        ("NVIDIA H200", 989, 495),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA A10", 125, 62),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA L4", 121, 60),
        ("Tesla V100-SXM2-16GB", 125, 15.7),
        ("Tesla T4", 65, 8.1),
        ("NVIDIA GeForce RTX 4090", 165, 83),
        ("NVIDIA GeForce RTX 3090", 71, 36),
        # Others, whose names only look alike.
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA A10G", None, None),
        ("NVIDIA T400 4GB", None, None),
        ("NVIDIA T4G", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA B200", None, None),
    ],
)
def test_peaks(
    monkeypatch: pytest.MonkeyPatch, name: str, half: float | None, fp32: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = {precision: _peak_tflops(GPU, precision) for precision in ("fp32", "bf16", "fp16")}
    assert found == {"fp32": fp32, "bf16": half, "fp16": half}


def test_every_peak_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is hidden by one before it."""
    for part, (half, _) in PEAK_TFLOPS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, part=part: part)
        assert _peak_tflops(GPU, "bf16") == half, part


def test_mfu_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 312 TFLOP/s a device does as many pictures as it can: three passes of each."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    known = Utilization(yolov5(0.33, 0.25), (640, 640), GPU, "bf16")
    full = 312e3 / (3 * known.gflops)
    assert known.share(full) == 1
    assert known.share(full / 4) == 0.25
    assert Utilization(yolov5(0.33, 0.25), (640, 640), GPU, "fp32").share(full / 4) == 0.5


def test_a_device_that_is_not_known_has_none() -> None:
    model = detector("--model.backbone.name", "test_convnext")
    assert Utilization(model, (640, 640), CPU, "bf16").share(100.0) is None
