"""Boxes follow pixels: coloured rectangles are painted, augmented, and looked for in the result."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.augment import FILL, Augmentation, Picture

from .rectangles import (
    COLOURS,
    EMPTY,
    FRAME,
    LANDSCAPE,
    NOTHING,
    PICTURES,
    WIDE,
    assert_boxes_follow_pixels,
    assert_well_formed,
    augment,
    painted,
)

fractions = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    seed=st.integers(0, 2**32 - 1),
    primary=st.sampled_from(PICTURES),
    mosaic=st.booleans(),
    scale=st.sampled_from([0.0, 0.2, 0.5]),
    translate=st.sampled_from([0.0, 0.1, 0.4]),
    flips=st.tuples(fractions, fractions),
)
def test_boxes_follow_pixels(seed, primary, mosaic, scale, translate, flips):
    options = dataclasses.replace(
        NOTHING,
        mosaic=float(mosaic),
        scale=scale,
        translate=translate,
        flip_left_right=flips[0],
        flip_up_down=flips[1],
    )
    result = augment(primary, PICTURES, *FRAME, options, np.random.default_rng(seed))
    assert_well_formed(result)
    largest = max((p[2] - p[0]) * (p[3] - p[1]) for q in PICTURES for p in q.boxes_xyxy)
    assert_boxes_follow_pixels(result, largest * (1 + scale) ** 2, tolerance_px=1.5)


@pytest.mark.parametrize("size", [(96, 128), (40, 128), (96, 20)])
def test_without_augmentation_the_picture_is_centred_and_unchanged(size):
    height, width = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    boxes = np.array([[0, 0, width, height]], np.float32)
    whole = Picture(image, boxes, np.array([7]))
    result = augment(whole, [EMPTY], *FRAME, NOTHING, np.random.default_rng(0))
    assert_well_formed(result)
    top, left = (FRAME[0] - height) // 2, (FRAME[1] - width) // 2
    expected = np.full((*FRAME, 3), FILL, np.uint8)
    expected[top : top + height, left : left + width] = image
    np.testing.assert_array_equal(result.image, expected)
    assert result.boxes_xyxy.tolist() == [[left, top, left + width, top + height]]
    assert result.labels.tolist() == [7]


def test_a_mosaic_shows_four_pictures_where_they_belong():
    """One colour a picture: top left, top right, bottom left, bottom right of the corner."""
    plain = [painted(FRAME, [(0, 0, FRAME[1], FRAME[0])], label) for label in range(4)]
    options = dataclasses.replace(NOTHING, mosaic=1.0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        result = augment(plain[0], plain[1:], *FRAME, options, rng)
        assert not (result.image == FILL).all(axis=-1).any()  # the frame is full
        rng = np.random.default_rng(seed)
        rng.random()
        chosen = rng.integers(3, size=3)
        x, y = np.round((rng.uniform(0.5, 1.5, size=2) - 0.5) * FRAME[::-1])
        x, y = int(np.clip(x, 2, FRAME[1] - 2)), int(np.clip(y, 2, FRAME[0] - 2))
        corners = ((y - 2, x - 2), (y - 2, x + 1), (y + 1, x - 2), (y + 1, x + 1))
        seen = [result.image[corner].tolist() for corner in corners]
        assert seen == [COLOURS[i].tolist() for i in (0, *(1 + chosen))]


def drawn(options: Augmentation, seed: int) -> Picture:
    return augment(WIDE, PICTURES, *FRAME, options, np.random.default_rng(seed))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), mosaic=st.sampled_from([0.0, 0.5, 1.0]))
def test_one_option_leaves_the_random_numbers_of_the_others_alone(seed, mosaic):
    base = dataclasses.replace(NOTHING, mosaic=mosaic, scale=0.3, translate=0.1, value=0.5)
    one = drawn(base, seed)

    coloured = drawn(dataclasses.replace(base, hue=0.5, saturation=0.5), seed)
    np.testing.assert_array_equal(coloured.boxes_xyxy, one.boxes_xyxy)

    flipped = drawn(dataclasses.replace(base, flip_left_right=1.0), seed)
    np.testing.assert_array_equal(flipped.image, one.image[:, ::-1])
    np.testing.assert_array_equal(flipped.boxes_xyxy[:, 1::2], one.boxes_xyxy[:, 1::2])
    np.testing.assert_allclose(
        flipped.boxes_xyxy[:, 0::2], FRAME[1] - one.boxes_xyxy[:, 2::-2], atol=1e-4
    )

    upside_down = drawn(dataclasses.replace(base, flip_up_down=1.0), seed)
    np.testing.assert_array_equal(upside_down.image, one.image[::-1])
    np.testing.assert_allclose(
        upside_down.boxes_xyxy[:, 1::2], FRAME[0] - one.boxes_xyxy[:, 3::-2], atol=1e-4
    )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), partners=st.sampled_from([1, 3, 8]))
def test_geometry_leaves_the_colours_alone(seed, partners):
    """The gains are drawn last, whatever was drawn for geometry and whether it was used."""
    plain = [painted(FRAME, [(0, 0, FRAME[1], FRAME[0])], 0)] * (1 + partners)
    base = dataclasses.replace(NOTHING, value=1.0)
    others = ({"mosaic": 1.0}, {"scale": 0.5}, {"translate": 0.3}, {"flip_left_right": 0.5})
    seen = {
        augment(
            plain[0],
            plain[1:],
            *FRAME,
            dataclasses.replace(base, **other),
            np.random.default_rng(seed),
        ).image.max()
        for other in ({}, *others)
    }
    assert len(seen) == 1


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_sample_is_a_function_of_pictures_and_key(seed):
    strong = Augmentation(0.5, 0.5, 0.2, 0.5, 0.5, 0.1, 0.7, 0.4)
    copies = [
        Picture(p.image.copy(), p.boxes_xyxy.copy(), p.labels.copy()) for p in (WIDE, *PICTURES)
    ]
    np.random.seed(seed)  # the global generator must not matter
    one = drawn(strong, seed)
    np.random.seed(0)
    two = augment(copies[0], copies[1:], *FRAME, strong, np.random.default_rng(seed))
    for field in ("image", "boxes_xyxy", "labels"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
    # The pictures stay in the lane's window and serve again: they must be as they were.
    for before, after in zip((WIDE, *PICTURES), copies, strict=True):
        for field in ("image", "boxes_xyxy", "labels"):
            np.testing.assert_array_equal(getattr(before, field), getattr(after, field))
            assert not np.shares_memory(getattr(after, field), getattr(two, field))


def test_another_key_gives_another_sample():
    strong = Augmentation(0.5, 0.5, 0.2, 0.5, 0.5, 0.1, 0.7, 0.4)
    images = {drawn(strong, seed).image.tobytes() for seed in range(30)}
    assert len(images) == 30


def one_box(box: tuple[float, float, float, float], options: Augmentation, seed: int) -> Picture:
    picture = Picture(LANDSCAPE.image, np.array([box], np.float32), np.array([3]))
    return augment(picture, [EMPTY], *FRAME, options, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((10, 10, 13, 13), True),
        ((10, 10, 12, 40), False),  # 2 px is not more than 2 px
        ((10, 10, 40, 12), False),
        ((10, 10, 12.1, 40), True),
        ((10, 10, 10.5, 10.5), False),
    ],
)
def test_small_boxes_are_dropped(box, kept):
    result = one_box(box, NOTHING, 0)
    assert result.labels.tolist() == ([3] if kept else [])
    assert result.boxes_xyxy.tolist() == ([pytest.approx(box)] if kept else [])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), factor=st.sampled_from([1, 2, 4]))
def test_pictures_smaller_than_the_frame_are_enlarged_to_fit_it(seed, factor):
    """The same sample as of the larger picture, up to interpolation."""
    options = dataclasses.replace(NOTHING, mosaic=1.0, scale=0.5, translate=0.1)
    small = Picture(
        np.ascontiguousarray(LANDSCAPE.image[::factor, ::factor]),
        LANDSCAPE.boxes_xyxy / factor,
        LANDSCAPE.labels,
    )
    result = augment(small, [small], *FRAME, options, np.random.default_rng(seed))
    whole = augment(LANDSCAPE, [LANDSCAPE], *FRAME, options, np.random.default_rng(seed))
    if result.labels.tolist() == whole.labels.tolist():  # none at the edge of being dropped
        np.testing.assert_allclose(result.boxes_xyxy, whole.boxes_xyxy, atol=1.5 * factor)
    assert_boxes_follow_pixels(result, 60 * 60 * 1.5**2, tolerance_px=1.5 + factor)


def test_slivers_are_dropped():
    """Sides over 2 px, but more than 100 times as long as wide."""
    image = np.zeros((640, 640, 3), np.uint8)
    boxes = np.array([[100, 10, 103, 300], [200, 10, 203, 320]], np.float32)
    picture = Picture(image, boxes, np.array([0, 1]))
    result = augment(picture, [picture], 640, 640, NOTHING, np.random.default_rng(0))
    assert result.labels.tolist() == [0]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_box_stays_with_more_than_a_tenth_in_view(seed):
    options = dataclasses.replace(NOTHING, translate=1.0)
    box = (40, 30, 90, 70)
    rng = np.random.default_rng(seed)
    rng.random(), rng.integers(1, size=3), rng.uniform(0, 1, 2), rng.uniform(0, 1)
    shift = np.round(rng.uniform(-1, 1, size=2) * FRAME[::-1])  # pictures move by whole pixels
    moved = np.array(box) + np.tile(shift, 2)
    clipped = np.clip(moved, 0, [*FRAME[::-1]] * 2)
    sides = clipped[2:] - clipped[:2]
    area = sides.prod()
    if abs(area - 200) < 1 or np.abs(sides - 2).min() < 0.01:
        return  # on the edge of the rule
    result = one_box(box, options, seed)
    expected = [clipped] if area > 200 and sides.min() > 2 else np.zeros((0, 4))
    np.testing.assert_allclose(result.boxes_xyxy, expected, atol=1e-3)


def test_full_hue_range_is_allowed():
    options = dataclasses.replace(NOTHING, hue=1.0)
    for seed in range(30):
        result = drawn(options, seed)
        np.testing.assert_array_equal(result.boxes_xyxy, drawn(NOTHING, seed).boxes_xyxy)
        assert result.image.max() == 255
