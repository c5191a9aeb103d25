"""YOLOv5's own weights in our names: YOLOv5 v6 as n, s, m, l, from safetensors or from `.pt`.

Upstream numbers its layers; the table below is the whole correspondence. Inside, a convolution is
`conv` and `bn`, a C3 block `cv1` (main), `cv2` (bypass), `cv3` (fuse) and `m`, SPPF `cv1` and
`cv2`. Nothing of YOLOv5 is needed to read its files, and nothing in them is executed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbone import STRIDES
from .detector import build_detector
from .errors import WeightsError
from .weights import WeightsInfo, save_weights
from .yolov5_files import Upstream, read_upstream

MODELS = {  # depth and width multiple
    "yolov5n": (0.33, 0.25),
    "yolov5s": (0.33, 0.50),
    "yolov5m": (0.67, 0.75),
    "yolov5l": (1.0, 1.0),
}

_LAYERS = {
    "backbone.stem": 0,
    **{f"backbone.stage{i}.0": 2 * i - 3 for i in (2, 3, 4, 5)},  # 1, 3, 5, 7
    **{f"backbone.stage{i}.1": 2 * i - 2 for i in (2, 3, 4, 5)},  # 2, 4, 6, 8
    "backbone.pool": 9,
    "neck.lateral5": 10,
    "neck.top_down4": 13,
    "neck.lateral4": 14,
    "neck.top_down3": 17,
    "neck.down3": 18,
    "neck.bottom_up4": 20,
    "neck.down4": 21,
    "neck.bottom_up5": 23,
    "head": 24,
}
_PARTS = {"main": "cv1", "bypass": "cv2", "fuse": "cv3", "blocks": "m", "norm": "bn"}
_PARTS |= {"reduce": "cv1", "expand": "cv2", "convs": "m"}

# COCO's 80 classes have the ids 1 to 90 without these.
_COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = tuple(i for i in range(1, 91) if i not in _COCO_GAPS)
COCO_NAMES = tuple(
    [
        "person",
        "bicycle",
        "car",
        "motorcycle",
        "airplane",
        "bus",
        "train",
        "truck",
        "boat",
        "traffic light",
        "fire hydrant",
        "stop sign",
        "parking meter",
        "bench",
        "bird",
        "cat",
        "dog",
        "horse",
        "sheep",
        "cow",
        "elephant",
        "bear",
        "zebra",
        "giraffe",
        "backpack",
        "umbrella",
        "handbag",
        "tie",
        "suitcase",
        "frisbee",
        "skis",
        "snowboard",
        "sports ball",
        "kite",
        "baseball bat",
        "baseball glove",
        "skateboard",
        "surfboard",
        "tennis racket",
        "bottle",
        "wine glass",
        "cup",
        "fork",
        "knife",
        "spoon",
        "bowl",
        "banana",
        "apple",
        "sandwich",
        "orange",
        "broccoli",
        "carrot",
        "hot dog",
        "pizza",
        "donut",
        "cake",
        "chair",
        "couch",
        "potted plant",
        "bed",
        "dining table",
        "toilet",
        "tv",
        "laptop",
        "mouse",
        "remote",
        "keyboard",
        "cell phone",
        "microwave",
        "oven",
        "toaster",
        "sink",
        "refrigerator",
        "book",
        "clock",
        "vase",
        "scissors",
        "teddy bear",
        "hair drier",
        "toothbrush",
    ]
)


def import_yolov5(
    source: Path, model: str, output: Path, image_px: tuple[int, int] = (640, 640)
) -> tuple[str, WeightsInfo]:
    """Writes upstream weights as a weights file of ours, in 32 bits.

    Args:
        source: safetensors with upstream's key names and `names` in its metadata, or upstream's
            `.pt`, whose averaged weights are taken where it has them.
        model: a key of `MODELS`.
        output: the weights file.
        image_px: height and width that the detector is for.

    Returns:
        The sha256 of the tensors, and what the new file says about itself.

    Raises:
        WeightsError: a file that is missing, damaged, of another model, or of unknown content.
    """
    found = read_upstream(source)
    classes = _classes(source, found.names)
    activation = found.yaml.get("activation") if isinstance(found.yaml, dict) else None
    if activation and "SiLU" not in str(activation):
        raise WeightsError(
            f"weights {source}: `activation` in its yaml is {activation!r}, not SiLU; "
            "give weights of YOLOv5 as it is published"
        )
    anchors = _anchors_px(source, found)
    depth, width = MODELS[model]
    architecture = {
        "name": "yolov5",
        "classes": len(classes),
        "depth": depth,
        "width": width,
        "anchors": anchors.tolist(),
    }
    tensors = _renamed(source, found.tensors, architecture, model)
    tensors["head.anchors"] = anchors
    info = WeightsInfo(architecture, classes, image_px)
    return save_weights(output, tensors, info), info


def upstream_name(name: str) -> str:
    """Our name of a tensor of `detector.yolov5` → YOLOv5's."""
    layer = next(own for own in _LAYERS if name.startswith(own + "."))
    parts = [_PARTS.get(part, part) for part in name.removeprefix(layer + ".").split(".")]
    if layer == "backbone.pool" and parts[0] == "cv3":  # SPPF has two convolutions, C3 three
        parts[0] = "cv2"
    return ".".join(("model", str(_LAYERS[layer]), *parts))


def _renamed(
    source: Path, tensors: Mapping[str, Tensor], architecture: dict[str, Any], model: str
) -> dict[str, Tensor]:
    """The tensors by our names, each of the right shape, and none left over."""
    with torch.device("meta"):  # names and shapes only
        wanted = build_detector(architecture).state_dict()
    result = {}
    for own, like in wanted.items():
        name = upstream_name(own)
        if name not in tensors:
            raise WeightsError(
                f"weights {source}: {name} is not there, and {model} needs it; "
                f"{_advice(tensors, model)}"
            )
        tensor = tensors[name]
        if tensor.shape != like.shape:
            raise WeightsError(
                f"weights {source}: {name} has the shape {tuple(tensor.shape)}, but {model} with "
                f"{architecture['classes']} classes needs {tuple(like.shape)}; "
                f"{_advice(tensors, model)}"
            )
        result[own] = tensor.to(like.dtype)
    # Older files keep the anchors a second time.
    spare = sorted(tensors.keys() - {*map(upstream_name, wanted), "model.24.anchor_grid"})
    if spare:
        raise WeightsError(
            f"weights {source}: {spare[0]} has no place in {model}; {_advice(tensors, model)}"
        )
    return result


def _advice(tensors: Mapping[str, Tensor], model: str) -> str:
    """What to do about weights that do not fit."""
    stem = tensors.get("model.0.conv.weight")
    channels = len(stem) if stem is not None and stem.dim() else 0
    for name, (_, width) in MODELS.items():
        if channels == 64 * width and name != model:
            return f"they look like {name}'s: give --model {name}"
    return f"give the weights of a YOLOv5 v6 detector that is one of {', '.join(MODELS)}"


def _classes(source: Path, names: Any) -> tuple[dict[str, Any], ...]:
    """Ids and names by index: COCO's own ids for COCO's classes, else counted from 0."""
    if isinstance(names, dict):
        indices = sorted(names, key=int) if all(str(key).isdecimal() for key in names) else []
        in_order = [int(key) for key in indices] == list(range(len(names)))
        names = [names[key] for key in indices] if in_order else None
    if not isinstance(names, list | tuple) or not names or not all(type(n) is str for n in names):
        raise WeightsError(
            f"weights {source}: `names`, the names of the classes in their order, is not there; "
            "give a file that YOLOv5 wrote, or put a JSON list of names into the metadata"
        )
    ids = COCO_IDS if tuple(names) == COCO_NAMES else range(len(names))
    return tuple({"id": i, "name": name} for i, name in zip(ids, names, strict=True))


def _anchors_px(source: Path, found: Upstream) -> Tensor:
    """Anchors `[3, A, 2]` in pixels: upstream keeps them in strides."""
    if found.strides not in (None, list(STRIDES)):
        raise WeightsError(
            f"weights {source}: `stride` is {found.strides}, not {list(STRIDES)}; "
            "give a model of three levels such as yolov5s"
        )
    anchors = found.tensors.get("model.24.anchors")
    if anchors is None or anchors.dim() != 3 or anchors.shape[::2] != (3, 2):
        raise WeightsError(
            f"weights {source}: model.24.anchors is not there with 3 levels; "
            "give the weights of a YOLOv5 v6 detector"
        )
    return anchors.float() * torch.tensor(STRIDES)[:, None, None]
