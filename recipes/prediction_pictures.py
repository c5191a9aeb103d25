"""Validation pictures, what is annotated in each beside what is predicted, as one JPEG.

The same few pictures at every evaluation, so that one sees a detector learn. N boxes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data_prep.errors import CorruptSampleError, DataError
from ..data_prep.reader import SampleReader
from ..model.detector import Detector
from ..model.letterbox import letterbox
from ..model.postprocess import candidates
from .evaluate import EvalSettings
from .figures import colour_of
from .files import whole_file

CONFIDENCE = 0.25  # below, boxes are so many that they hide the picture
SIDE_PX = 480  # the longer side of a picture as it is drawn
GAP_PX = 8
FONT_PX = 12
LINE_PX = 2


@dataclass(frozen=True)
class ShownBoxes:
    """Boxes of one picture, in its pixels."""

    boxes_xyxy: np.ndarray  # [N, 4]
    labels: np.ndarray  # [N] class index
    confidences: np.ndarray | None = None  # [N]; None: annotated ones


@dataclass(frozen=True)
class FirstPredictions:
    """The first validation pictures, what is predicted and what is annotated in each."""

    pictures: list[np.ndarray]  # each [H, W, 3] uint8, RGB
    predictions: list[ShownBoxes]
    truths: list[ShownBoxes]


def save_predictions(
    path: Path,
    model: Detector,
    reader: SampleReader,
    settings: EvalSettings,
    count: int,
) -> list[Path]:
    """Predicts and draws the first validation pictures; a failure is only told.

    Args:
        path: the JPEG, see `pictures_path`.
        model, reader, settings, count: as in `first_predictions`.

    Returns:
        The path, if there are pictures now.
    """
    try:
        shown = first_predictions(model, reader, settings, count)
        if not shown.pictures:
            return []
        names = [c.name for c in reader.classes]
        draw_predictions(shown.pictures, shown.predictions, shown.truths, names, path)
        return [path]
    except (OSError, DataError) as error:
        print(f"warning: {path}: not drawn ({error})", file=sys.stderr, flush=True)
        return []


@torch.no_grad()
def first_predictions(
    model: Detector, reader: SampleReader, settings: EvalSettings, count: int
) -> FirstPredictions:
    """Predicts the first validation pictures that can be read, in this process alone.

    Args:
        model: a plain module in evaluation mode, on whatever device.
        reader: the validation set.
        settings: frame and thresholds; at least `CONFIDENCE` is asked for.
        count: of pictures, at most.

    Raises:
        DataError: the shards can't be reached.
    """
    device = next(model.parameters()).device
    confidence = max(settings.confidence, CONFIDENCE)
    shown = FirstPredictions([], [], [])
    for position in range(len(reader)):
        if len(shown.pictures) == count:
            break
        try:
            sample = reader.decode(position)
        except CorruptSampleError:
            continue  # the evaluation has told of it
        image, frame = letterbox(sample.image, *settings.frame_px)
        # One by one: a batch of another size would be another memory peak on the GPU.
        pixels = torch.from_numpy(image)[None].to(device).permute(0, 3, 1, 2)
        boxes, scores = model.decode(model(pixels))
        (picture,) = candidates(boxes, scores, [frame], confidence)
        found = picture.suppress(confidence, settings.iou)
        shown.pictures.append(sample.image)
        shown.predictions.append(
            ShownBoxes(found.boxes.numpy(), found.labels.numpy(), found.scores.numpy())
        )
        shown.truths.append(ShownBoxes(sample.boxes_xyxy, sample.labels))
    return shown


def draw_predictions(
    pictures: Sequence[np.ndarray],
    predictions: Sequence[ShownBoxes],
    truths: Sequence[ShownBoxes],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Draws a line for each picture: left what is annotated, right what is predicted.

    Args:
        pictures: at least one, RGB `[H, W, 3]` uint8.
        predictions: of each picture, best first.
        truths: of each picture.
        classes: the names, in index order.
        path: the JPEG; replaced in one atomic step.

    Raises:
        OSError: it can't be written.
    """
    lines = [
        (_drawn(picture, truth, classes), _drawn(picture, predicted, classes))
        for picture, predicted, truth in zip(pictures, predictions, truths, strict=True)
    ]
    width_px = 2 * max(left.width for left, _ in lines) + 3 * GAP_PX
    heading_px = FONT_PX + 2 * GAP_PX
    height_px = heading_px + sum(left.height + GAP_PX for left, _ in lines)
    sheet = Image.new("RGB", (width_px, height_px), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    middle_px = width_px // 2 + GAP_PX // 2
    for x_px, text in ((GAP_PX, "annotated"), (middle_px, "predicted")):
        draw.text((x_px, GAP_PX), text, fill="black", font=font)
    y_px = heading_px
    for left, right in lines:
        sheet.paste(left, (GAP_PX, y_px))
        sheet.paste(right, (middle_px, y_px))
        y_px += left.height + GAP_PX
    with whole_file(path) as partial:
        sheet.save(partial, format="JPEG", quality=90)


def _drawn(picture: np.ndarray, shown: ShownBoxes, classes: Sequence[str]) -> Image.Image:
    """A picture in the size that it is drawn in, with its boxes; the best last, on top."""
    height, width = picture.shape[:2]
    scale = SIDE_PX / max(height, width)
    size_px = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(picture).resize(size_px)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_PX)
    labels = shown.labels.tolist()
    texts = [classes[label] for label in labels]
    if shown.confidences is not None:
        texts = [f"{text} {c:.2f}" for text, c in zip(texts, shown.confidences, strict=True)]
    rows = list(zip((shown.boxes_xyxy * scale).tolist(), labels, texts, strict=True))[::-1]
    for (x1, y1, x2, y2), label, _ in rows:
        # Pillow refuses a box that is turned inside out, which rounding makes of a sliver.
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour_of(label), width=LINE_PX)
    for (x1, y1, _, _), label, text in rows:
        _, _, text_width, text_height = draw.textbbox((0, 0), text, font=font)
        left = max(0, min(x1, size_px[0] - text_width - 2))
        top = max(0, y1 - text_height - 2)
        draw.rectangle((left, top, left + text_width + 2, top + text_height + 2), colour_of(label))
        draw.text((left + 1, top + 1), text, fill="white", font=font)
    return image
