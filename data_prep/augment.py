"""Augmentation of detection samples: mosaic, scale and translation, flips, HSV.

Everything random comes from the generator that the caller passes in, so a sample is a pure
function of its pictures and its key. Pictures come in already scaled to the frame (see
`stream.Lane`); each is warped once, straight into the result: pasting four of them on a canvas
of twice the size and warping that would cost twice as much. N boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

FILL = 114  # grey around pictures, the letterbox's


@dataclass(frozen=True)
class Augmentation:
    """How strongly to augment. Fractions unless said otherwise."""

    mosaic: float  # probability of four pictures instead of one
    scale: float  # zoom is drawn from [1 - scale, 1 + scale]
    translate: float  # shift is drawn from ± this share of the frame
    flip_left_right: float  # probability
    flip_up_down: float  # probability
    hue: float  # gains are drawn from 1 ± these
    saturation: float
    value: float


@dataclass(frozen=True)
class Picture:
    """A picture scaled to the frame, with its boxes."""

    image: np.ndarray  # [H, W, 3] uint8, RGB
    boxes_xyxy: np.ndarray  # [N, 4] float32, pixels
    labels: np.ndarray  # [N] int64


def augment(
    primary: Picture,
    partners: Sequence[Picture],
    height_px: int,
    width_px: int,
    options: Augmentation,
    rng: np.random.Generator,
) -> Picture:
    """Makes one training sample of the frame's size.

    Args:
        primary: the picture whose sample this is.
        partners: the pictures that a mosaic may take, at least one.
        height_px, width_px: the frame.
        options: strengths.
        rng: the sample's own generator.
    """
    # Every number is drawn whether it is used or not, so that one option leaves the others alone.
    is_mosaic = rng.random() < options.mosaic
    chosen = rng.integers(len(partners), size=3)
    centre = rng.uniform(0.5, 1.5, size=2)  # of the mosaic, in frames, on a canvas of two
    zoom = rng.uniform(1 - options.scale, 1 + options.scale)
    shift = rng.uniform(-options.translate, options.translate, size=2)
    flips = rng.random(size=2) < (options.flip_left_right, options.flip_up_down)
    gains = 1 + rng.uniform(-1, 1, 3) * (options.hue, options.saturation, options.value)

    frame = np.array([width_px, height_px], np.float64)
    if is_mosaic:
        pictures = [primary, *(partners[i] for i in chosen)]
        corner = frame / 2 + zoom * (centre - 1) * frame + shift * frame  # where the four meet
        result = _mosaic(pictures, corner, zoom, height_px, width_px)
    else:
        size = np.array(primary.image.shape[1::-1])
        origin = frame / 2 - zoom * size / 2 + shift * frame
        canvas = np.full((height_px, width_px, 3), FILL, np.uint8)
        _paste(canvas, primary.image, origin, zoom, (0, 0, width_px, height_px))
        boxes, labels = _move_boxes(primary, origin, zoom, (0, 0, width_px, height_px))
        result = Picture(canvas, boxes, labels)
    image = _jitter(result.image, gains)
    boxes = result.boxes_xyxy
    if flips[0]:
        image, boxes = image[:, ::-1], _mirror(boxes, width_px, axis=0)
    if flips[1]:
        image, boxes = image[::-1], _mirror(boxes, height_px, axis=1)
    return Picture(np.ascontiguousarray(image), boxes, result.labels)


def _mosaic(
    pictures: Sequence[Picture], corner: np.ndarray, zoom: float, height_px: int, width_px: int
) -> Picture:
    """Four pictures that meet at `corner`: top left, top right, bottom left, bottom right."""
    canvas = np.full((height_px, width_px, 3), FILL, np.uint8)
    x, y = int(np.clip(round(corner[0]), 0, width_px)), int(np.clip(round(corner[1]), 0, height_px))
    quadrants = (
        (0, 0, x, y),
        (x, 0, width_px, y),
        (0, y, x, height_px),
        (x, y, width_px, height_px),
    )
    boxes, labels = [], []
    for i, (picture, region) in enumerate(zip(pictures, quadrants, strict=True)):
        size = np.array(picture.image.shape[1::-1]) * zoom
        # A picture on the left ends at the corner, one on the right starts there; same for rows.
        origin = corner - size * (1 - i % 2, 1 - i // 2)
        _paste(canvas, picture.image, origin, zoom, region)
        moved, kept = _move_boxes(picture, origin, zoom, region)
        boxes.append(moved)
        labels.append(kept)
    return Picture(canvas, np.concatenate(boxes), np.concatenate(labels))


Region = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the frame


def _paste(
    canvas: np.ndarray, image: np.ndarray, origin: np.ndarray, zoom: float, region: Region
) -> None:
    """Warps a picture into a region of the canvas: canvas = picture · zoom + origin."""
    x1, y1, x2, y2 = region
    if x2 <= x1 or y2 <= y1:
        return
    # Pixel centres lie at half-integers: hence zoom/2 - 1/2.
    offset = origin - (x1, y1) + zoom / 2 - 0.5
    matrix = np.array([[zoom, 0, offset[0]], [0, zoom, offset[1]]])
    canvas[y1:y2, x1:x2] = cv2.warpAffine(
        image,
        matrix,
        (x2 - x1, y2 - y1),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(FILL, FILL, FILL),
    )


def _move_boxes(
    picture: Picture, origin: np.ndarray, zoom: float, region: Region
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes after a paste, clipped to the region; what is left too small of a box is dropped.

    YOLOv5's rule: a box stays with sides over 2 px, sides within a factor of 100, and more than
    a tenth of its area in view.
    """
    whole = picture.boxes_xyxy * zoom + np.tile(origin, 2)
    clipped = whole.copy()
    clipped[:, 0::2] = whole[:, 0::2].clip(region[0], region[2])
    clipped[:, 1::2] = whole[:, 1::2].clip(region[1], region[3])
    w, h = (clipped[:, 2:] - clipped[:, :2]).T
    area = (whole[:, 2:] - whole[:, :2]).prod(axis=1)
    aspect = np.maximum(w / (h + 1e-9), h / (w + 1e-9))
    keep = (w > 2) & (h > 2) & (aspect < 100) & (w * h > 0.1 * area)
    return clipped[keep].astype(np.float32), picture.labels[keep]


def _jitter(image: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Multiplies hue, saturation and value by the gains, hue on its circle."""
    if np.all(gains == 1):
        return image
    levels = np.arange(256)
    table = np.stack(
        (
            (levels * gains[0]) % 180,
            (levels * gains[1]).clip(0, 255),
            (levels * gains[2]).clip(0, 255),
        ),
        axis=-1,
    ).astype(np.uint8)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _mirror(boxes: np.ndarray, size_px: int, axis: int) -> np.ndarray:
    mirrored = boxes.copy()
    mirrored[:, axis] = size_px - boxes[:, axis + 2]
    mirrored[:, axis + 2] = size_px - boxes[:, axis]
    return mirrored
