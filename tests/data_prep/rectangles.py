"""Coloured rectangles: painted, augmented as the stream does it, and found again in the result."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from convnext_yolo.data_prep.augment import Augmentation, Draw, Picture, place_boxes, render

FRAME = (96, 128)  # height, width
NOTHING = Augmentation(
    mosaic=0, scale=0, translate=0, flip_left_right=0, flip_up_down=0, hue=0, saturation=0, value=0
)
# The label of an object is its colour's place here. No blend of one with black, with the grey
# around pictures or with white comes near another one.
COLOURS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]], np.uint8
)


def painted(size: tuple[int, int], boxes: list[tuple[int, int, int, int]], first: int) -> Picture:
    """A black picture of `size` (height, width) with one rectangle of a colour for each box."""
    image = np.zeros((*size, 3), np.uint8)
    labels = np.arange(first, first + len(boxes)) % len(COLOURS)
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        image[y1:y2, x1:x2] = COLOURS[label]
    return Picture(image, np.array(boxes, np.float32).reshape(-1, 4), labels)


# Letterboxed pictures fill one side of the frame. Objects keep off the border, so that those of
# two pictures never touch.
LANDSCAPE = painted((96, 128), [(10, 12, 50, 40), (60, 30, 118, 88)], 0)
WIDE = painted((60, 128), [(8, 8, 40, 52), (70, 10, 100, 30), (72, 36, 120, 50)], 2)
TALL = painted((96, 50), [(6, 6, 44, 40), (12, 50, 30, 90)], 5)
EMPTY = painted((96, 128), [], 0)
PICTURES = (LANDSCAPE, WIDE, TALL, EMPTY)


def augment(
    primary: Picture,
    partners: Sequence[Picture],
    height: int,
    width: int,
    options: Augmentation,
    rng: np.random.Generator,
) -> Picture:
    """All that the stream does to a sample."""
    draw = Draw(options, len(partners), rng)
    pictures = [primary, *(partners[i] for i in draw.partners if draw.is_mosaic)]
    layout = draw.layout([(p.image.shape[0], p.image.shape[1]) for p in pictures], (height, width))
    image = np.empty((height, width, 3), np.uint8)
    render(layout, [p.image for p in pictures], (height, width), image)
    return Picture(image, *place_boxes(layout, pictures, (height, width)))


def found(image: np.ndarray, label: int) -> np.ndarray:
    """`[K, 4]`: bounding boxes of the patches of a colour."""
    distance = np.abs(image.astype(int) - COLOURS[label]).max(axis=-1)
    mask = (distance < 128).astype(np.uint8)
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    x, y, w, h = stats[1:count, :4].T
    return np.stack((x, y, x + w, y + h), axis=1).reshape(-1, 4)


def assert_boxes_follow_pixels(result: Picture, whole_area: float, tolerance_px: float) -> None:
    """Every box has its patch of colour, and every patch that is not a mere rest has its box."""
    for label in range(len(COLOURS)):
        patches = found(result.image, label)
        boxes = result.boxes_xyxy[result.labels == label]
        gaps = np.abs(boxes[:, None] - patches[None]).max(axis=-1)  # [boxes, patches]
        if len(boxes):
            assert len(patches), "a box round nothing"
            assert gaps.min(axis=1).max() <= tolerance_px, (boxes, patches)
        areas = (patches[:, 2:] - patches[:, :2]).prod(axis=1)
        for patch, area, gap in zip(patches, areas, gaps.T, strict=True):
            sides = patch[2:] - patch[:2]
            if area > 0.2 * whole_area and sides.min() > 4:
                assert gap.size and gap.min() <= tolerance_px, f"no box round {patch}"


def assert_well_formed(result: Picture) -> None:
    height, width = FRAME
    assert result.image.shape == (height, width, 3)
    assert result.image.dtype == np.uint8
    assert result.image.flags.c_contiguous
    assert result.boxes_xyxy.dtype == np.float32
    assert result.boxes_xyxy.shape == (len(result.labels), 4)
    assert result.labels.dtype == np.int64
    assert ((result.boxes_xyxy >= 0) & (result.boxes_xyxy <= [width, height] * 2)).all()
    assert (result.boxes_xyxy[:, 2:] - result.boxes_xyxy[:, :2] > 2).all()
