"""A small detector, its weights, and random scenes of objects, for all tests of the room."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from convnext_yolo.model.assign import Targets
from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.weights import WeightsInfo, save_weights

COCO_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
SMALL_ANCHORS = (((6, 8), (12, 9)), ((16, 20), (30, 18)), ((40, 44), (60, 90)))
# Objects that have troubled some detector or other.
KINDS = ("none", "one", "some", "300", "duplicates", "border", "tiny", "huge")


@pytest.fixture(scope="session")
def architecture() -> dict[str, Any]:
    """The detector that tests train and save: 0.2 million parameters, timm's test backbone."""
    return {
        "name": "seed_convnext_yolo",
        "classes": 3,
        "backbone": {"name": "test_convnext"},
        "adapter_channels": [16, 24, 32],
        "neck_channels": [8, 16, 24],
        "neck_repeats": 1,
        "anchors": COCO_ANCHORS,
    }


@pytest.fixture(scope="session")
def info(architecture) -> WeightsInfo:
    return WeightsInfo(
        architecture=architecture,
        classes=({"id": 1, "name": "red"}, {"id": 4, "name": "größer"}, {"id": 9, "name": "c"}),
        image_px=(64, 96),
        step=1234,
        recipe="run: runs/x\nseed: 0\n",
        metrics={"AP": 0.5, "AP50": 0.75},
    )


@pytest.fixture(scope="session")
def tensors(architecture) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_detector(architecture).state_dict()


@pytest.fixture(scope="session")
def exported(tmp_path_factory, tensors, info) -> Path:
    """Weights of the small detector, in a file that tests leave as it is."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(path, tensors, info)
    # safetensors writes its header in another order every time, and tests want the same bytes.
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    return path


@dataclass(frozen=True)
class Scene:
    """Objects of a batch, on a frame that is not square."""

    targets: Targets
    images: int
    classes: int
    height_px: int = 64
    width_px: int = 96
    strides: tuple[int, ...] = (8, 16, 32)
    anchors: Any = SMALL_ANCHORS

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Cells of the levels."""
        return [(self.height_px // s, self.width_px // s) for s in self.strides]

    def logits(self, seed: int, scale: float) -> list[torch.Tensor]:
        """Raw maps of a network that could have seen the scene."""
        generator = torch.Generator().manual_seed(seed)
        anchors = len(self.anchors[0])
        shapes = [(self.images, anchors, h, w, 5 + self.classes) for h, w in self.sizes]
        return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def make_scene(seed: int, kind: str, classes: int, images: int) -> Scene:
    """Corners are multiples of a quarter pixel: 32 bits hold them and their cells exactly."""
    rng = np.random.default_rng(seed)
    frame = np.array([Scene.width_px, Scene.height_px] * 2)
    count = {"none": 0, "one": 1, "300": 300}.get(kind, int(rng.integers(2, 12)))
    side = {"tiny": (0.25, 4), "huge": (48, 96)}.get(kind, (0.25, 64))
    sizes = rng.uniform(*side, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * np.maximum(frame[:2] - sizes, 0)
    if kind == "border":  # every box touches one
        corner = np.where(rng.random((count, 2)) < 0.5, 0, frame[:2] - sizes)
    boxes = np.concatenate((corner, corner + sizes), axis=1)
    boxes = np.clip(np.round(boxes * 4) / 4, 0, frame)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 0.25)
    labels, image = rng.integers(classes, size=count), rng.integers(images, size=count)
    if kind == "duplicates":
        pick = rng.integers(min(3, count), size=count)
        boxes, image = boxes[pick], image[pick]  # but labels of their own
    return Scene(
        Targets(
            torch.from_numpy(image.astype(np.int64)),
            torch.from_numpy(labels.astype(np.int64)),
            torch.from_numpy(boxes.astype(np.float32)).reshape(-1, 4),
        ),
        images,
        classes,
    )


@pytest.fixture(scope="session")
def scenes() -> dict[str, st.SearchStrategy[Scene]]:
    """A strategy for each kind of scene."""
    return {
        kind: st.builds(
            make_scene,
            seed=st.integers(0, 2**32 - 1),
            kind=st.just(kind),
            classes=st.sampled_from((1, 2, 5)),
            images=st.integers(1, 3),
        )
        for kind in KINDS
    }
