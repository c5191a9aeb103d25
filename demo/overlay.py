"""Boxes above a picture: as SVG for the page, with Pillow for the download. One look for both.

Every class has one colour, the same in picture, table and download. All of them are dark enough for
white letters (WCAG contrast 4.5), and lie on a white line, so that they show on any background.
"""

import colorsys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from convnext_yolo.model.postprocess import Detections

_GOLDEN_ANGLE = 137.508 / 360  # of the colour circle: neighbours in the list are far apart in hue
_LUMINANCES = (0.16, 0.07)  # contrast to white 5.0 and 8.8
_LABEL_LENGTH = 24  # characters; longer class names are cut


@lru_cache(maxsize=1024)
def class_colour(index: int) -> str:
    """The colour of a class by its index, `#rrggbb`: the same at every call, everywhere."""
    hue = (210 / 360 + index * _GOLDEN_ANGLE) % 1
    target = _LUMINANCES[index // 12 % 2]  # after a dozen hues, a second shade keeps them apart
    low, high = 0.0, 1.0
    for _ in range(20):  # luminance grows with lightness: bisect
        lightness = (low + high) / 2
        rgb = colorsys.hls_to_rgb(hue, lightness, 0.9)
        low, high = (lightness, high) if luminance(rgb) < target else (low, lightness)
    return "#" + "".join(f"{int(channel * 255):02x}" for channel in rgb)


def luminance(rgb: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour with channels in [0, 1] (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def label_text(name: str, score: float) -> str:
    """What stands at a box, such as "RBC 0.93"."""
    # Control characters are neither XML nor legible.
    name = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in name)
    short = name if len(name) <= _LABEL_LENGTH else name[: _LABEL_LENGTH - 1] + "…"
    return f"{short} {score:.2f}"


def svg_overlay(found: Detections, width_px: int, height_px: int, names: Sequence[str]) -> str:
    """The boxes as an `<svg>` that covers the picture, however large that is shown.

    Places are percentages of the picture, lines and letters have the screen's size. The elements
    are styled in `assets/page.css`. Screen readers skip it: the page has a table for them.

    Args:
        found: N boxes, best first.
        width_px, height_px: size of the picture.
        names: of the classes, in index order; any text.
    """
    size = np.array([width_px, height_px] * 2)
    percent = found.boxes.double().numpy() / size * 100  # [N, 4]
    frames, labels = [], []
    for box, score, index in zip(
        percent, found.scores.tolist(), found.labels.tolist(), strict=True
    ):
        text, colour = label_text(names[index], score), class_colour(index)
        frames.append(_svg_frame(box, colour, text))
        labels.append(_svg_label(box, colour, text))
    # The best last, on top of the others; labels on top of all boxes. Many labels would hide the
    # picture: on a phone they are left out from `many` boxes on, everywhere from a `crowd` on.
    density = "crowd" if len(found) > 60 else "many" if len(found) > 12 else "few"
    parts = "".join(reversed(frames)) + "".join(reversed(labels))
    return f'<svg class="overlay {density}" aria-hidden="true">{parts}</svg>'


def _svg_frame(box: np.ndarray, colour: str, text: str) -> str:
    left, top, right, bottom = box
    place = (
        f'x="{left:.3f}%" y="{top:.3f}%" width="{right - left:.3f}%" height="{bottom - top:.3f}%"'
    )
    return (
        f'<g class="box"><title>{escape(text)}</title><rect class="halo" {place}/>'
        f'<rect class="line" {place} stroke="{colour}"/></g>'
    )


def _svg_label(box: np.ndarray, colour: str, text: str) -> str:
    """A label above its box, inside where there is no room, never over the right border."""
    left, top, right, _ = box
    # 7 px a letter of the monospaced 11.5 px; East Asian letters are as wide as two.
    letters = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    width = letters * 7 + 8
    y = 0 if top < 7 else -17
    corner, x = (right, -width) if left > 60 else (left, 0)
    return (
        f'<svg class="label" x="{corner:.3f}%" y="{top:.3f}%">'
        f'<rect x="{x}" y="{y}" width="{width}" height="17" fill="{colour}"/>'
        f'<text x="{x + 4}" y="{y + 12.5}" textLength="{width - 8}">{escape(text)}</text></svg>'
    )


def draw_boxes(picture: np.ndarray, found: Detections, names: Sequence[str]) -> Image.Image:
    """The picture with its boxes, for the download; lines and letters grow with the picture.

    Args:
        picture: RGB `[H, W, 3]` uint8; stays as it is.
        found: N boxes, best first.
        names: of the classes, in index order.
    """
    image = Image.fromarray(picture).copy()
    draw = ImageDraw.Draw(image)
    width_px, height_px = image.size
    line_px = max(2, round(max(image.size) / 400))
    font = _font(min(max(max(image.size) / 55, 11), 64))
    rows = list(
        zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    )
    rows.reverse()  # the best last, on top of the others; labels on top of all boxes
    for (left, top, right, bottom), _, label in rows:
        box = (left, top, min(right, width_px - 1), min(bottom, height_px - 1))
        draw.rectangle(_grown(box, line_px // 2 + 1), outline="white", width=line_px + 2)
        draw.rectangle(_grown(box, 0), outline=class_colour(label), width=line_px)
    for (left, top, _, _), score, label in rows:
        text = label_text(names[label], score)
        _draw_label(draw, image.size, (left, top), text, class_colour(label), font)
    return image


def _grown(box: Sequence[float], by_px: int) -> tuple[float, float, float, float]:
    """A box larger on all sides, at least one pixel wide and high: Pillow refuses others."""
    left, top, right, bottom = box
    return left - by_px, top - by_px, max(right, left) + by_px, max(bottom, top) + by_px


def _draw_label(
    draw: ImageDraw.ImageDraw,
    size_px: tuple[int, int],
    corner: tuple[float, float],
    text: str,
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """A label above its box, moved inside the picture where it would leave it."""
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    pad = max(2, height // 5)
    left = max(0, min(corner[0], size_px[0] - width - 2 * pad))
    top = corner[1] - height - 2 * pad
    top = corner[1] if top < 0 else top
    draw.rectangle((left, top, left + width + 2 * pad, top + height + 2 * pad), fill=colour)
    draw.text((left + pad, top + pad), text, fill="white", font=font)


@lru_cache(maxsize=64)
def _font(size_px: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size_px)  # has more scripts than Pillow's own
    except OSError:
        return ImageFont.load_default(size_px)
