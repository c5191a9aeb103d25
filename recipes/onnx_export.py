"""ONNX: exported weights as a graph for onnxruntime and its like.

In:  `images` float32 `[batch, 3, H, W]`: RGB in [0, 1], letterboxed to the weights' `image_px`, as
     programs around YOLO models feed it; the batch is free, H and W are fixed.
Out: `boxes` `[batch, M, 4]` xyxy in input pixels and `scores` `[batch, M, C]`, or with suppression
     inside `detections` `[N, 7]`: image, x1, y1, x2, y2, score, class; images in turn, best first.
The file's metadata says so too, beside classes, sizes, strides and the sha256 of the weights.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.detector import Detector
from ..model.letterbox import FILL
from ..model.postprocess import MAX_DETECTIONS
from ..model.weights import WeightsInfo, load_detector
from .files import whole_file

FORMAT = "convnext-yolo onnx 1"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OPSET = 20  # the first with GELU as one operator; onnxruntime 1.17 and later run it
TOLERANCE_PX = 0.1  # rounding is below a hundredth of this


class ExportError(Exception):
    """Something that can't be exported. The text is one sentence."""

    exit_code = 2


@dataclass(frozen=True)
class Suppression:
    """Non-maximum suppression inside the graph; by class, as `model.postprocess` does it.

    Raises:
        ExportError: a number that is not from 0 to 1.
    """

    confidence: float = 0.25
    iou: float = 0.45

    def __post_init__(self) -> None:
        for name in ("confidence", "iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ExportError(f"--{name} {getattr(self, name)}: give a number from 0 to 1")


# Boxes need no change of corners: IoU is the same with x and y exchanged. TopK is stable, so that
# sorting by score and then by image leaves the images in turn and the best of each first; `rank`
# counts from 1 within an image. A class never gives more boxes than an image may keep.
_SUPPRESS = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
suppress (float[batch, candidates, 4] boxes, float[batch, candidates, classes] scores)
    => (float[found, 7] detections)
<
    float[1] confidence = {{{confidence!r}}}, float[1] iou = {{{iou!r}}},
    int64[1] most = {{{most}}}, int64[1] last = {{1}}, int64[1] first = {{0}},
    int64[2] off_on = {{0, 1}}
>
{{
    by_class = Transpose <perm = [0, 2, 1]> (scores)
    chosen = NonMaxSuppression (boxes, by_class, most, iou, confidence)
    image, label, candidate = Split <axis = 1, num_outputs = 3> (chosen)
    score = GatherND (by_class, chosen)
    where = Concat <axis = 1> (image, candidate)
    box = GatherND (boxes, where)
    image_f = Cast <to = 1> (image)
    label_f = Cast <to = 1> (label)
    score_column = Unsqueeze (score, last)
    row = Concat <axis = 1> (image_f, box, score_column, label_f)
    count = Shape <start = 0, end = 1> (chosen)
    sorted_score, by_score = TopK <axis = 0, largest = 1> (score, count)
    image_flat = Squeeze (image, last)
    image_by_score = Gather (image_flat, by_score)
    sorted_image, by_image = TopK <axis = 0, largest = 0> (image_by_score, count)
    order = Gather (by_score, by_image)
    batch_size = Shape <start = 0, end = 1> (boxes)
    of_image = OneHot <axis = 1> (sorted_image, batch_size, off_on)
    seen = CumSum (of_image, first)
    own_seen = Mul (seen, of_image)
    rank = ReduceSum <keepdims = 0> (own_seen, last)
    is_kept = LessOrEqual (rank, most)
    kept = Compress <axis = 0> (order, is_kept)
    detections = Gather <axis = 0> (row, kept)
}}
"""


class _Decoded(nn.Module):
    """Images in, decoded predictions out."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = self.detector.decode(self.detector(images))
        return boxes, scores


def export_onnx(weights: Path, output: Path, suppression: Suppression | None = None) -> float:
    """Writes exported weights as one ONNX file, in one atomic step.

    The graph is first run in onnxruntime beside PyTorch, on noise.

    Args:
        weights: a file of `export` or `import`.
        output: the ONNX file.
        suppression: inside the graph; None: decoded predictions come out.

    Returns:
        The largest difference of a box's side from PyTorch's, in pixels.

    Raises:
        WeightsError: unusable weights.
        ExportError: a missing package, a graph that differs from PyTorch, or no room for the file.
    """
    need_packages()
    detector, info = load_detector(weights)
    model = trace(detector, info.image_px)
    off_px = difference_px(model, detector, info.image_px)
    if not off_px <= TOLERANCE_PX:
        raise ExportError(
            f"ONNX of {weights}: its boxes are up to {off_px:.3g} px off PyTorch's in "
            "onnxruntime, so nothing was written; install the versions in constraints.txt"
        )
    if suppression:
        model = with_suppression(model, suppression)
    describe(model, detector, info, suppression)
    try:
        with whole_file(output) as partial:
            partial.write_bytes(model.SerializeToString())
    except OSError as error:
        raise ExportError(
            f"ONNX {output}: can't be written ({error}); choose another place, or make room"
        ) from error
    return off_px


def trace(detector: Detector, image_px: tuple[int, int]) -> Any:
    """The graph from `images` to `boxes` and `scores`, an `onnx.ModelProto`."""
    program = torch.onnx.export(
        _Decoded(detector).eval(),
        # Two images: torch would take a batch of one for a constant.
        (torch.zeros(2, 3, *image_px),),
        input_names=["images"],
        output_names=["boxes", "scores"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    # The exporter's notes hold the source lines and paths of the machine that it ran on.
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.initializer):
        value.ClearField("metadata_props")
    return model


def with_suppression(model: Any, options: Suppression) -> Any:
    """The graph with non-maximum suppression behind it: `detections` come out instead."""
    import onnx

    text = _SUPPRESS.format(
        ir=model.ir_version,
        opset=model.opset_import[0].version,
        most=MAX_DETECTIONS,
        iou=options.iou,
        confidence=options.confidence,
    )
    names = [(name, name) for name in ("boxes", "scores")]
    # Both graphs may have chosen the same names inside; the outputs' stay as they are.
    after = onnx.compose.add_prefix(
        onnx.parser.parse_model(text), "nms/", rename_inputs=False, rename_outputs=False
    )
    return onnx.compose.merge_models(model, after, io_map=names)


def describe(
    model: Any, detector: Detector, info: WeightsInfo, suppression: Suppression | None
) -> None:
    """Puts all that a user of the file must know into its metadata."""
    import onnx

    height, width = info.image_px
    outputs = (
        "detections float32 [N, 7]: image, x1, y1, x2, y2, score, class; images in turn, best "
        "first; boxes in input pixels"
        if suppression
        else "boxes float32 [batch, M, 4]: x1, y1, x2, y2 in input pixels; "
        f"scores float32 [batch, M, {len(info.classes)}] in [0, 1]"
    )
    facts = {
        "format": FORMAT,
        "architecture": json.dumps(info.architecture),
        "classes": json.dumps(info.classes),
        "image_px": json.dumps(info.image_px),
        "strides": json.dumps(detector.head.strides),
        "step": str(info.step),
        "sha256": info.sha256,
        "input": f"images float32 [batch, 3, {height}, {width}]: RGB in [0, 1]; a picture is "
        f"scaled to fit, keeping its shape, and centred on grey {FILL}/255",
        "output": outputs,
    }
    if suppression:
        facts["suppression"] = json.dumps(
            {**suppression.__dict__, "by_class": True, "max_detections": MAX_DETECTIONS}
        )
    onnx.helper.set_model_props(model, facts)
    model.producer_name = "convnext-yolo"
    model.graph.name = str(info.architecture["name"])


def difference_px(model: Any, detector: Detector, image_px: tuple[int, int]) -> float:
    """Runs a traced graph and its detector on noise; the largest difference of a side, in pixels.

    The whole range of a score counts as much as the picture's width.
    """
    import onnxruntime

    images = torch.rand(2, 3, *image_px, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        boxes, scores = _Decoded(detector)(images)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings of graph clean-up, about which nothing can be done
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found_boxes, found_scores = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
    scores_off_px = (found_scores - scores).abs().max() * image_px[1]
    return float(torch.maximum((found_boxes - boxes).abs().max(), scores_off_px))


def need_packages() -> None:
    """Raises ExportError where a package of the onnx extra is missing."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ExportError(
                f"ONNX export: the package {package} can't be imported ({error}); "
                "`pip install 'convnext-yolo[onnx]'` brings it"
            ) from error
