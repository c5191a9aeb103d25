"""Augmentation of detection samples: mosaic, scale and translation, flips, colour.

First numbers are drawn (`Draw`), then a `Layout` says which rectangle of which picture is
stretched onto which rectangle of the frame; boxes follow from it exactly. Whoever has the
pixels renders it: `render` here with OpenCV, `device.DeviceComposer` with torch. A picture's zoom
is that which fits it to the frame times the sample's, and it is resized once, straight into the
result: pasting four on a canvas of twice the size and warping that costs five times as much.

Everything random comes from the generator that the caller passes in, so a sample is a pure
function of its pictures and its key. N boxes; rectangles are xyxy in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

FILL = 114  # grey around pictures, the letterbox's
PARTNERS = 3  # pictures that a mosaic takes beside the primary one

Rectangle = tuple[int, int, int, int]

# RGB → brightness and two colour differences: the YIQ of NTSC, where a hue is an angle.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True)
class Augmentation:
    """How strongly to augment. Fractions unless said otherwise."""

    mosaic: float  # probability of four pictures instead of one
    scale: float  # zoom is drawn from [1 - scale, 1 + scale]
    translate: float  # shift is drawn from ± this share of the frame
    flip_left_right: float  # probability
    flip_up_down: float  # probability
    hue: float  # turned by ± this share of a circle
    saturation: float  # gains are drawn from 1 ± these
    value: float


@dataclass(frozen=True)
class Picture:
    """A picture no larger than the frame, with its boxes."""

    image: Any  # [H, W, 3] uint8, RGB: of numpy, or of torch on a device that composes
    boxes_xyxy: np.ndarray  # [N, 4] float32, pixels
    labels: np.ndarray  # [N] int64


@dataclass(frozen=True)
class Paste:
    """A rectangle of a picture, stretched onto a rectangle of the frame."""

    picture: int  # 0: the primary one, then its partners
    source: Rectangle
    target: Rectangle


@dataclass(frozen=True)
class Layout:
    """How a sample is composed of its pictures."""

    pastes: tuple[Paste, ...]
    mirrored: tuple[bool, bool]  # left-right, up-down; after all else
    colour: np.ndarray  # [3, 3] float32, takes RGB to RGB


class Draw:
    """The random numbers of one sample.

    Every number is drawn whether it is used or not, so that one option leaves the others alone.
    """

    def __init__(self, options: Augmentation, window: int, rng: np.random.Generator):
        self.is_mosaic: bool = rng.random() < options.mosaic
        self.partners: list[int] = rng.integers(window, size=PARTNERS).tolist()
        self.centre = rng.uniform(0.5, 1.5, size=2)  # of the mosaic, in frames, on a canvas of two
        self.zoom = float(rng.uniform(1 - options.scale, 1 + options.scale))
        self.shift = rng.uniform(-options.translate, options.translate, size=2)  # in frames
        flips = rng.random(size=2) < (options.flip_left_right, options.flip_up_down)
        self.mirrored: tuple[bool, bool] = (bool(flips[0]), bool(flips[1]))
        hue, saturation, value = rng.uniform(-1, 1, 3) * (
            options.hue,
            options.saturation,
            options.value,
        )
        self.colour = colour_matrix(hue, 1 + saturation, 1 + value)

    def layout(self, sizes: Sequence[tuple[int, int]], frame_px: tuple[int, int]) -> Layout:
        """Where the pictures go: one in the middle, or four round a corner.

        Args:
            sizes: height and width of the primary picture and of the partners of a mosaic.
            frame_px: height and width of the result.
        """
        frame = np.array(frame_px[::-1], np.float64)
        if self.is_mosaic:
            corner = (0.5 + self.zoom * (self.centre - 1) + self.shift) * frame
            pastes = _round_corner(sizes, corner.tolist(), self.zoom, frame_px)
        else:
            zoom = self.zoom * _fitting(sizes[0], frame_px)
            origin = (frame - np.array(sizes[0][::-1]) * zoom) / 2 + self.shift * frame
            origin = origin.tolist()
            pastes = [_paste(0, sizes[0], origin, zoom, (0, 0, frame_px[1], frame_px[0]))]
        return Layout(tuple(p for p in pastes if p), self.mirrored, self.colour)


def _round_corner(
    sizes: Sequence[tuple[int, int]],
    corner: Sequence[float],
    zoom: float,
    frame_px: tuple[int, int],
) -> list[Paste | None]:
    """Four pictures that meet at `corner`: top left, top right, bottom left, bottom right."""
    height, width = frame_px
    x, y = (
        int(np.clip(round(c), 0, side)) for c, side in zip(corner, (width, height), strict=True)
    )
    quadrants = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    pastes = []
    for i, (size, quadrant) in enumerate(zip(sizes, quadrants, strict=True)):
        own = zoom * _fitting(size, frame_px)
        # A picture on the left ends at the corner, one on the right starts there; same for rows.
        origin = (corner[0] - size[1] * own * (1 - i % 2), corner[1] - size[0] * own * (1 - i // 2))
        pastes.append(_paste(i, size, origin, own, quadrant))
    return pastes


def _fitting(size: tuple[int, int], frame_px: tuple[int, int]) -> float:
    """What a picture of a height and width is multiplied by to fit the frame."""
    return min(frame_px[0] / size[0], frame_px[1] / size[1])


def _paste(
    picture: int, size: tuple[int, int], origin: Sequence[float], zoom: float, limit: Rectangle
) -> Paste | None:
    """The part of frame = picture · zoom + origin inside `limit`; None where nothing is.

    Rounded to whole pixels on both sides, so that a resize does it: six times as fast as a warp.
    The zoom of the part then differs from that asked for by a fraction of a pixel over its length.
    """
    x = _span(size[1], origin[0], zoom, limit[0], limit[2])
    y = _span(size[0], origin[1], zoom, limit[1], limit[3])
    if x is None or y is None:
        return None
    return Paste(picture, (x[0], y[0], x[1], y[1]), (x[2], y[2], x[3], y[3]))


def _span(
    size: int, origin: float, zoom: float, low: int, high: int
) -> tuple[int, int, int, int] | None:
    """Along one axis: from and to in the picture, from and to in the frame."""
    start, end = max(low, round(origin)), min(high, round(origin + size * zoom))
    if end <= start:
        return None
    first = min(size - 1, max(0, round((start - origin) / zoom)))
    last = max(first + 1, min(size, round((end - origin) / zoom)))
    return first, last, start, end


def colour_matrix(hue: float, saturation: float, value: float) -> np.ndarray:
    """Turns the hue by a share of a circle and multiplies saturation and value: `[3, 3]` float32.

    The same jitter as in HSV, made linear: one pass over the pixels instead of three.
    """
    cos, sin = (saturation * f(2 * math.pi * hue) for f in (math.cos, math.sin))
    turned = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return (value * _RGB @ turned @ _YIQ).astype(np.float32)


def render(
    layout: Layout, images: Sequence[np.ndarray], frame_px: tuple[int, int], out: np.ndarray
) -> None:
    """Writes the sample's pixels.

    Args:
        layout: of the sample.
        images: `[H, W, 3]` uint8, the primary picture and its partners.
        frame_px: height and width of the result.
        out: `[*frame_px, 3]` uint8, written over.
    """
    canvas = np.full((*frame_px, 3), FILL, np.uint8)
    for paste in layout.pastes:
        (x1, y1, x2, y2), (left, top, right, bottom) = paste.source, paste.target
        cv2.resize(
            images[paste.picture][y1:y2, x1:x2],
            (right - left, bottom - top),
            dst=canvas[top:bottom, left:right],
            interpolation=cv2.INTER_LINEAR,
        )
    coloured = cv2.transform(canvas, layout.colour)
    match layout.mirrored:
        case (False, False):
            np.copyto(out, coloured)
        case (True, True):
            cv2.flip(coloured, -1, dst=out)
        case (left_right, _):
            cv2.flip(coloured, 1 if left_right else 0, dst=out)


def place_boxes(
    layout: Layout, pictures: Sequence[Picture], frame_px: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The sample's boxes `[N, 4]` float32 and labels `[N]`; what is left too small is dropped.

    YOLOv5's rule: a box stays with sides over 2 px, sides within a factor of 100, and more than
    a tenth of its area in view.
    """
    shown = [pictures[paste.picture] for paste in layout.pastes]
    if not sum(len(picture.labels) for picture in shown):
        return np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    counts = [len(picture.labels) for picture in shown]
    boxes = np.concatenate([picture.boxes_xyxy for picture in shown]).reshape(-1, 2, 2)
    labels = np.concatenate([picture.labels for picture in shown])
    # [N, 2, 2]: for each box the corners of the rectangles that it is moved from and to
    source = np.array([paste.source for paste in layout.pastes], np.float64).repeat(counts, axis=0)
    target = np.array([paste.target for paste in layout.pastes], np.float64).repeat(counts, axis=0)
    source, target = source.reshape(-1, 2, 2), target.reshape(-1, 2, 2)
    zoom = (target[:, 1:] - target[:, :1]) / (source[:, 1:] - source[:, :1])
    whole = (boxes - source[:, :1]) * zoom + target[:, :1]
    clipped = whole.clip(target[:, :1], target[:, 1:])
    sides = clipped[:, 1] - clipped[:, 0]
    area = (whole[:, 1] - whole[:, 0]).prod(axis=1)
    long, short = sides.max(axis=1), sides.min(axis=1)
    keep = (short > 2) & (long < 100 * short) & (sides.prod(axis=1) > 0.1 * area)
    boxes, labels = clipped[keep].reshape(-1, 4).astype(np.float32), labels[keep]
    for axis, mirrored in enumerate(layout.mirrored):
        if mirrored:
            boxes[:, [axis, axis + 2]] = frame_px[1 - axis] - boxes[:, [axis + 2, axis]]
    return boxes, labels
