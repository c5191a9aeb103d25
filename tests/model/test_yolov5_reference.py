"""Matching, losses and decoding against numbers that YOLOv5 itself gave.

For two pictures: its raw maps, its decoded predictions, its losses and its positives per level.
The numbers lie beside the repository on the developers' machines only; README.md there says how
they came about. Nothing of YOLOv5's code was read for this.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convnext_yolo.model.assign import Targets, match_anchors
from convnext_yolo.model.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from convnext_yolo.model.head import AnchorHead
from convnext_yolo.model.losses import AnchorCriterion

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "reference"
NAME = "yolov5n_two_images_320"

pytestmark = pytest.mark.skipif(
    not (FOLDER / f"{NAME}.json").is_file(),
    reason=f"needs ../shared/reference/{NAME}.*, which is not part of the project",
)


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return json.loads((FOLDER / f"{NAME}.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{NAME}.safetensors")


@pytest.fixture(scope="module")
def raw(tensors) -> list[torch.Tensor]:
    return [tensors[f"raw_p{level}"] for level in (3, 4, 5)]


@pytest.fixture(scope="module")
def head() -> AnchorHead:
    anchors = (
        ((10, 13), (16, 30), (33, 23)),
        ((30, 61), (62, 45), (59, 119)),
        ((116, 90), (156, 198), (373, 326)),
    )
    return AnchorHead((1, 1, 1), 80, anchors, (8, 16, 32))


@pytest.fixture(scope="module")
def targets(tensors, numbers) -> Targets:
    """Image, class, and centre and size as shares of the picture."""
    rows = tensors["targets"]
    boxes = cxcywh_to_xyxy(rows[:, 2:]) * numbers["input_px"]
    return Targets(rows[:, 0].long(), rows[:, 1].long(), boxes)


def test_positives_of_each_level(head, raw, targets, numbers):
    sizes = [tuple(level.shape[2:4]) for level in raw]
    matches = match_anchors(targets, head.anchors, head.strides, sizes)
    assert [len(level.image) for level in matches] == numbers["positives_per_level"]


def test_the_three_losses(head, raw, targets, numbers):
    # The gain of objectness in the file is already scaled to the input size; ours scales itself.
    gains = numbers["gains"]
    unscaled = gains["obj"] * (640 / numbers["input_px"]) ** 2
    losses = AnchorCriterion(gains["box"], unscaled, gains["cls"])(head, raw, targets)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(numbers[name], abs=1e-6), name
    total = sum(losses.values()).item() * 2  # pictures
    assert total == pytest.approx(numbers["total_loss_times_batch"], abs=1e-5)


def test_decoding(head, raw, tensors):
    boxes, scores = head.decode(raw)
    want = tensors["decoded"]
    torch.testing.assert_close(xyxy_to_cxcywh(boxes), want[..., :4], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, want[..., 4:5] * want[..., 5:], rtol=0, atol=1e-6)
