import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from convnext_yolo.model.letterbox import FILL, letterbox


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


sides = st.one_of(st.integers(1, 80), st.sampled_from((1, 2, 333, 641)))
frames = st.integers(1, 4).map(lambda n: n * 32)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(height=sides, width=sides, frame_h=frames, frame_w=frames)
def test_boxes_come_back(height, width, frame_h, frame_w):
    framed, where = letterbox(picture(height, width), frame_h, frame_w)
    assert framed.shape == (frame_h, frame_w, 3) and framed.dtype == np.uint8
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (20, 2, 2)), axis=1).reshape(20, 4)
    boxes = (corners * [width, height, width, height]).astype(np.float32)
    boxes[0] = 0, 0, width, height
    placed = where.to_input(boxes)
    assert placed.dtype == np.float32
    # Inside the frame, but for half a pixel of rounding where the size does not divide.
    assert (placed >= -0.51).all() and (placed <= np.array([frame_w, frame_h] * 2) + 0.51).all()
    back = where.to_picture(torch.from_numpy(placed))
    longest = max(height, width)
    assert np.abs(back.numpy() - boxes).max() <= 1e-5 * longest / where.scale + 1e-4 * longest


@settings(max_examples=60, derandomize=True, deadline=None)
@given(height=sides, width=sides, frame_h=frames, frame_w=frames)
def test_the_picture_lies_where_it_says(height, width, frame_h, frame_w):
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    framed, where = letterbox(white, frame_h, frame_w)
    inside = (framed == 255).all(-1)
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    shown_h, shown_w = len(rows), len(columns)
    assert rows[0] == where.top_px and columns[0] == where.left_px
    assert shown_h == max(1, round(height * where.scale))
    assert shown_w == max(1, round(width * where.scale))
    assert inside.sum() == shown_h * shown_w  # one rectangle
    assert (framed[~inside] == FILL).all()  # and grey around it
    assert shown_h == frame_h or shown_w == frame_w  # as large as can be
    # Centred, the odd pixel to the right and below.
    assert frame_h - where.top_px - shown_h - where.top_px in (0, 1)
    assert frame_w - where.left_px - shown_w - where.left_px in (0, 1)


def test_a_picture_that_fits_is_not_touched():
    image = picture(64, 96)
    framed, where = letterbox(image, 64, 96)
    assert np.array_equal(framed, image) and not np.shares_memory(framed, image)
    assert (where.scale, where.left_px, where.top_px) == (1, 0, 0)
    boxes = np.array([[1.5, 2, 90, 60]], np.float32)
    assert np.array_equal(where.to_input(boxes), boxes)


def test_a_picture_that_fits_one_way_is_only_moved():
    image = picture(64, 33)
    framed, where = letterbox(image, 64, 96)
    assert where.left_px == 31 and np.array_equal(framed[:, 31:64], image)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (1, 30), (3, 5000)])
def test_slivers(size):
    framed, where = letterbox(np.full((*size, 3), 200, np.uint8), 64, 96)
    inside = (framed != FILL).any(-1)
    assert inside.any(1).sum() >= 1 and inside.any(0).sum() >= 1
    assert (framed[inside] == 200).all()
    assert (where.height_px, where.width_px) == size


def test_shrinking_averages():
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, np.arange(640) % 4 < 2] = 200  # two and two: sampling alone would give 0 or 200
    framed, _ = letterbox(stripes, 64, 64)
    middle = framed[:, 4:-4].astype(int)
    assert abs(middle - 100).max() <= 12


def test_boxes_are_clipped_to_the_picture():
    _, where = letterbox(picture(50, 100), 64, 64)
    boxes = torch.tensor([[-10.0, -10, 200, 200], [0, 0, 5, 3]])
    assert where.to_picture(boxes).tolist()[0] == [0, 0, 100, 50]
    assert where.to_picture(boxes)[1, 3] == 0  # in the grey above it
    assert where.to_picture(torch.zeros(0, 4)).shape == (0, 4)
    assert where.to_input(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_views_and_read_only_pictures_are_taken_without_a_warning():
    image = picture(50, 80)
    wanted, _ = letterbox(image[:, ::-1].copy(), 64, 64)
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        framed, _ = letterbox(image[:, ::-1], 64, 64)
        letterbox(image, 64, 64)
    assert np.array_equal(framed, wanted)


def test_a_limit_leaves_the_rest_of_the_frame_grey():
    image = np.full((48, 64, 3), 200, np.uint8)
    framed, where = letterbox(image, 96, 160, fit_px=(64, 128))
    assert (where.scale, where.left_px, where.top_px) == (64 / 48, 37, 16)
    inside = (framed != FILL).all(-1)
    assert inside[16:80, 37:122].all() and inside.sum() == 64 * 85
    # A limit beyond the frame changes nothing, and neither does the frame's own size.
    for fit in ((200, 300), (96, 160), None):
        again, there = letterbox(picture(48, 64), 96, 160, fit_px=fit)
        want, wanted = letterbox(picture(48, 64), 96, 160)
        assert np.array_equal(again, want) and there == wanted
