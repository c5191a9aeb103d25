"""How many parameters the published detectors have, as trained and folded for inference."""

from typing import Any

import pytest
import torch
from torch import nn

from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.fuse import fuse
from convnext_yolo.model.layers import Conv


def counts(architecture: dict[str, Any]) -> tuple[int, int]:
    """Parameters as trained, and with each BatchNorm folded into the convolution before it."""
    with torch.device("meta"):
        detector = build_detector(architecture)
    trained = sum(p.numel() for p in detector.parameters())
    convs = [m for m in detector.modules() if isinstance(m, Conv)]
    folded = [m for m in convs if isinstance(m.norm, nn.BatchNorm2d)]
    # Weight and bias of the norm go, a bias of the convolution comes.
    by_hand = trained - sum(m.norm.num_features for m in folded)
    assert sum(p.numel() for p in fuse(detector).parameters()) == by_hand
    return trained, by_hand


@pytest.mark.parametrize(
    ("depth", "width", "trained", "folded"),
    [
        (0.33, 0.25, 1_872_157, 1_867_405),
        (0.33, 0.50, 7_235_389, 7_225_885),
        (0.67, 0.75, 21_190_557, 21_172_173),
        (1.0, 1.0, 46_563_709, 46_533_693),
    ],
    ids="nsml",
)
def test_yolov5_to_the_parameter(architecture, depth, width, trained, folded):
    published = {"name": "yolov5", "classes": 80, "depth": depth, "width": width}
    assert counts(published | {"anchors": architecture["anchors"]}) == (trained, folded)


@pytest.mark.parametrize(
    ("neck_channels", "neck_repeats", "trained", "folded"),
    [
        ((64, 128, 256), 1, 29_223_709, 29_221_597),
        ((96, 192, 384), 2, 30_740_797, None),  # the study does not tell
    ],
    ids="sm",
)
def test_the_seeds_models_to_the_parameter(
    architecture, neck_channels, neck_repeats, trained, folded
):
    adapters = (128, 256, 512)
    study = {
        "classes": 80,
        "backbone": {"name": "convnext_tiny"},
        "adapter_channels": adapters,
        "neck_channels": neck_channels,
        "neck_repeats": neck_repeats,
    }
    found, by_hand = counts(architecture | study)
    assert found == trained
    if folded is not None:
        # The study's count is that of YOLOv5's blocks folded. The norms of its adapters stayed.
        assert by_hand + sum(adapters) == folded
