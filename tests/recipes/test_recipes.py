"""The recipes that come with the package: they load, and what their headers say of sizes is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_yolo.data_prep.stream import BatchPlan
from convnext_yolo.model.detector import Detector, build_detector, without_pretrained
from convnext_yolo.recipes import config
from convnext_yolo.recipes.build import architecture
from convnext_yolo.recipes.engine import deepspeed_config
from convnext_yolo.recipes.load import load_recipe

OVERLAYS = ("zero1", "zero2", "zero3", "offload")  # for any recipe
EVERY = sorted(Path(config.__file__).parent.glob("*.yaml"))
FILES = [file for file in EVERY if file.stem not in OVERLAYS]
COCO = [file for file in FILES if file.stem.endswith("_coco")]


def build(file: Path, classes: int = 80) -> Detector:
    return build_detector(without_pretrained(architecture(load_recipe([file]), classes))).eval()


def size(detector: nn.Module) -> int:
    return sum(p.numel() for p in detector.parameters())


def gflops(detector: Detector) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector(torch.zeros(1, 3, 640, 640))
    return counter.get_total_flops() / 1e9


def test_they_are_all_there() -> None:
    assert {file.stem for file in COCO} == {
        *("convnext_tiny_coco", "convnext_nano_coco", "seed_convnext_coco"),
        *("yolov5s_coco", "yolov5m_coco"),
    }
    for file in FILES:
        header = re.match(r"(#.*\n)+", file.read_text())
        assert header and "command" in header[0] and "measured " in header[0], file
        assert "MEASURED" not in header[0]


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_change_nothing_but_deepspeed(name: str) -> None:
    [base] = [file for file in FILES if file.stem == "quickstart"]
    [overlay] = [file for file in EVERY if file.stem == name]
    plain, laid = load_recipe([base]), load_recipe([base, overlay])
    assert laid.model_copy(update={"deepspeed": plain.deepspeed}) == plain
    stage = deepspeed_config(laid, BatchPlan(8, 8, 0, 1))["zero_optimization"]["stage"]
    assert stage == (2 if name == "offload" else int(name[-1]))
    assert f"--config {name}" in overlay.read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_parameters_as_the_header_says(file: Path) -> None:
    """So that a measured number beside them is not that of another model."""
    classes = 80 if file in COCO else 3
    assert f"{size(build(file, classes)):,}" in file.read_text().split("run:")[0]


@pytest.mark.parametrize(
    ("name", "most_parameters", "most_gflops"),
    [("convnext_tiny_coco", 36_000_000, 90), ("convnext_nano_coco", 21_200_000, 90)],
)
def test_ours_within_their_limits(name: str, most_parameters: int, most_gflops: float) -> None:
    [file] = [file for file in COCO if file.stem == name]
    detector = build(file)
    assert size(detector) <= most_parameters
    flops = gflops(detector)
    assert flops <= most_gflops
    assert f"{flops:.1f} GFLOPs" in file.read_text().split("run:")[0]
    batch_norms = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
    assert not [m for m in detector.modules() if isinstance(m, batch_norms)]


def test_the_studys_runs_share_their_setting() -> None:
    """Same batch, schedule, augmentation, optimizer: only the detector differs."""
    study = ("yolov5s_coco", "yolov5m_coco", "seed_convnext_coco")
    runs = [load_recipe([file]) for file in COCO if file.stem in study]
    for section in ("batch", "augment", "optimizer", "schedule", "ema", "data"):
        assert len({getattr(run, section).model_dump_json() for run in runs}) == 1, section


def test_quickstart_and_its_rival_differ_in_the_model_only() -> None:
    ours, study = (
        load_recipe([file]) for file in FILES if file.stem in ("quickstart", "quickstart_seed")
    )
    assert ours.model.name == "convnext_yolo" and study.model.name == "seed_convnext_yolo"
    assert ours.model.backbone == study.model.backbone
    rest = {"model", "run"}
    assert ours.model_dump(exclude=rest) == study.model_dump(exclude=rest)
