"""The first validation pictures with their predictions, drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnext_yolo.data_prep.errors import CorruptSampleError
from convnext_yolo.data_prep.reader import Sample, ShardReader
from convnext_yolo.model.detector import build_detector
from convnext_yolo.recipes import prediction_pictures
from convnext_yolo.recipes.evaluate import EvalSettings
from convnext_yolo.recipes.prediction_pictures import (
    CONFIDENCE,
    GAP_PX,
    SIDE_PX,
    ShownBoxes,
    draw_predictions,
    first_predictions,
    save_predictions,
)

SETTINGS = EvalSettings(frame_px=(64, 96), batch=2, workers=0, confidence=0.001, iou=0.65)


@pytest.fixture(scope="module")
def detector() -> torch.nn.Module:
    torch.manual_seed(0)
    design = {
        "name": "yolov5",
        "classes": 3,
        "depth": 0.33,
        "width": 0.0625,
        "anchors": [[[10, 13], [16, 30], [33, 23]]] * 3,
    }
    return build_detector(design).eval()


def few(reader: ShardReader, bad: set[int]) -> ShardReader:
    """The reader, some of whose samples are corrupt."""

    class Some:
        classes = reader.classes

        def __len__(self) -> int:
            return 4

        def decode(self, position: int) -> Sample:
            if position in bad:
                raise CorruptSampleError("shard", str(position), "is torn")
            return reader.decode(position)

    return Some()  # type: ignore[return-value]


def test_the_first_readable_pictures_are_predicted_alike_each_time(
    tiny_shards: Path, detector: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_pictures, "CONFIDENCE", 0.0)  # an untrained one is unsure
    reader = ShardReader(str(tiny_shards / "val"))
    once = first_predictions(detector, few(reader, {1}), SETTINGS, 2)
    again = first_predictions(detector, few(reader, {1}), SETTINGS, 2)
    expected = [reader.decode(0), reader.decode(2)]
    for shown, sample in zip(once.pictures, expected, strict=True):
        assert np.array_equal(shown, sample.image)
    for truth, sample in zip(once.truths, expected, strict=True):
        assert np.array_equal(truth.boxes_xyxy, sample.boxes_xyxy) and truth.confidences is None
    for first, second in zip(once.predictions, again.predictions, strict=True):
        assert len(first.boxes_xyxy) and first.confidences is not None
        assert np.array_equal(first.boxes_xyxy, second.boxes_xyxy)
    assert len(first_predictions(detector, few(reader, set()), SETTINGS, 9).pictures) == 4


def test_a_picture_is_beside_its_prediction(tmp_path: Path) -> None:
    picture = np.full((100, 200, 3), 200, np.uint8)
    truth = ShownBoxes(np.array([[20.0, 40, 60, 80]]), np.array([0]))
    predicted = ShownBoxes(
        np.array([[120.0, 40, 160, 80], [5.0, 5, 4.9, 5]]), np.array([1, 0]), np.array([0.9, 0.3])
    )
    path = tmp_path / "new" / "step-00000004.jpg"
    draw_predictions([picture], [predicted], [truth], ["RBC", "WBC"], path)
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
    scale = SIDE_PX / 200
    assert drawn.shape[1] == 2 * SIDE_PX + 3 * GAP_PX
    top = drawn.shape[0] - GAP_PX - round(100 * scale)

    def is_drawn(left_px: int, x: float, y: float) -> bool:
        """Whether a picture's pixel is far from its grey."""
        column, row = left_px + round(x * scale), top + round(y * scale)
        return bool(np.abs(drawn[row, column] - 200).max() > 50)

    left, right = GAP_PX, 2 * GAP_PX + SIDE_PX
    assert is_drawn(left, 40, 79.8) and not is_drawn(left, 140, 79.8)  # lower edges
    assert is_drawn(right, 140, 79.8) and not is_drawn(right, 40, 79.8)
    assert not is_drawn(left, 40, 60)  # boxes are not filled


def test_what_cannot_be_drawn_is_only_told(
    tiny_shards: Path,
    detector: torch.nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = ShardReader(str(tiny_shards / "val"))
    path = tmp_path / "predictions" / "step-00000004.jpg"
    assert save_predictions(path, detector, reader, SETTINGS, 2) == [path]
    assert Image.open(path).width == 2 * SIDE_PX + 3 * GAP_PX
    assert save_predictions(path, detector, few(reader, {0, 1, 2, 3}), SETTINGS, 2) == []
    (tmp_path / "file").write_text("")
    assert save_predictions(tmp_path / "file" / "a.jpg", detector, reader, SETTINGS, 2) == []
    assert "not drawn" in capsys.readouterr().err
    assert SETTINGS.confidence < CONFIDENCE
