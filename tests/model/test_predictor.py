import numpy as np
import pytest
import torch

from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.letterbox import letterbox
from convnext_yolo.model.postprocess import candidates
from convnext_yolo.model.predictor import Predictor
from convnext_yolo.model.weights import WeightsInfo, save_weights

SIZES = ((64, 96), (1, 1), (30, 200), (333, 111))


@pytest.fixture(scope="module")
def predictor(architecture) -> Predictor:
    torch.manual_seed(0)
    detector = build_detector(architecture)
    with torch.no_grad():
        for conv in detector.head.convs:
            conv.weight *= 5
            conv.bias.fill_(0.5)  # a fresh detector finds nothing, this one everything
    info = WeightsInfo(architecture, ({"id": 1, "name": "a"},) * 3, (64, 96))
    return Predictor(detector, info, device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def test_boxes_are_in_the_pixels_of_each_picture(predictor, pictures):
    for found, (height, width) in zip(predictor(pictures), SIZES, strict=True):
        assert len(found) > 0
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height] * 2)).all()
        assert (found.scores.diff() <= 0).all() and (found.scores > 0.25).all()


def test_a_picture_alone_is_a_picture_in_a_batch(predictor, pictures):
    for together, picture in zip(predictor(pictures), pictures, strict=True):
        (alone,) = predictor([picture])
        torch.testing.assert_close(alone.boxes, together.boxes, rtol=1e-3, atol=1e-3)
        assert torch.equal(alone.labels, together.labels)


def test_the_path_is_letterbox_network_threshold_suppression(predictor, pictures):
    framed, where = letterbox(pictures[0], 64, 96)
    images = torch.from_numpy(framed).permute(2, 0, 1)[None]
    with torch.no_grad():
        decoded = predictor.detector.decode(predictor.detector(images))
    (found,) = candidates(*decoded, [where], 0.01)
    want = found.suppress(0.01, 1.0)
    (got,) = predictor(pictures[:1], confidence=0.01, iou=1.0)
    torch.testing.assert_close(got.boxes, want.boxes)
    assert torch.equal(got.scores, want.scores)


def test_candidates_are_filtered_without_the_network(predictor, pictures):
    (found,) = predictor.candidates(pictures[:1], confidence=0.01)
    (want,) = predictor(pictures[:1], confidence=0.3, iou=0.5)
    got = found.suppress(0.3, 0.5)
    assert len(found.found) > len(got) > 0
    assert torch.equal(got.boxes, want.boxes)


def test_loading_from_a_file(tmp_path, predictor, pictures):
    path = tmp_path / "model.safetensors"
    save_weights(path, predictor.detector.state_dict(), predictor.info)
    loaded = Predictor.load(path, device="cpu")
    assert torch.equal(loaded(pictures)[0].boxes, predictor(pictures)[0].boxes)
