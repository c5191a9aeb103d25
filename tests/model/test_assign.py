"""The matching against its published description, written as loops over Python's floats."""

import math
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from convnext_yolo.model.assign import Matches, Targets, match_anchors

KINDS = ("none", "one", "some", "300", "duplicates", "border", "tiny", "huge")


class Positive(NamedTuple):
    image: int
    anchor: int
    row: int
    column: int
    label: int
    box: tuple[float, ...]  # cxcywh in cells, from the cell's corner
    anchor_size: tuple[float, float]


def expected(
    targets: Targets, anchors: Any, stride: int, height: int, width: int
) -> list[Positive]:
    """Positives of a level, in order: own cell, left, up, right, down; then by anchor, object."""
    positives = []
    objects = list(zip(*(field.tolist() for field in targets), strict=True))
    for step_x, step_y in ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1)):
        for a, (anchor_w, anchor_h) in enumerate(anchors):
            for image, label, (x1, y1, x2, y2) in objects:
                w, h = x2 - x1, y2 - y1
                if max(w / anchor_w, anchor_w / w, h / anchor_h, anchor_h / h) >= 4:
                    continue
                x, y = (x1 + x2) / 2 / stride, (y1 + y2) / 2 / stride
                column, row = neighbour(x, step_x, width), neighbour(y, step_y, height)
                if column is None or row is None:
                    continue
                positives.append(
                    Positive(
                        image,
                        a,
                        row,
                        column,
                        label,
                        (x - column, y - row, w / stride, h / stride),
                        (anchor_w / stride, anchor_h / stride),
                    )
                )
    return positives


def neighbour(x: float, step: int, cells: int) -> int | None:
    """The cell that `step` leads to, if it is inside and on the side that `x` is nearer to.

    A centre exactly on an edge is "near" the cell after it, which is its own: YOLOv5 counts it
    twice, and its positives per level (test_yolov5_reference.py) show it.
    """
    if step == 0:
        return math.floor(x)
    if step < 0:
        return math.floor(x) - 1 if x > 1 and x - math.floor(x) < 0.5 else None
    from_end = cells - x
    near = from_end > 1 and from_end - math.floor(from_end) < 0.5
    return math.ceil(x) if near else None


def listed(matches: Matches) -> list[Positive]:
    columns = [field.tolist() for field in matches]
    rows = zip(*columns, strict=True)
    return [Positive(*row[:5], tuple(row[5]), tuple(row[6])) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, derandomize=True, deadline=None)
@given(data=st.data())
def test_the_matching_is_the_published_one(scenes, kind, data):
    scene = data.draw(scenes[kind])
    found = match_anchors(scene.targets, torch.tensor(scene.anchors), scene.strides, scene.sizes)
    levels = zip(found, scene.anchors, scene.strides, scene.sizes, strict=True)
    for matches, anchors, stride, size in levels:
        want = expected(scene.targets, anchors, stride, *size)
        got = listed(matches)
        assert [p[:5] for p in got] == [p[:5] for p in want]
        for have, wish in zip(got, want, strict=True):
            assert have.box == pytest.approx(wish.box, abs=1e-5)
            assert have.anchor_size == pytest.approx(wish.anchor_size)
            # The reach of the decoding: a positive outside it could never be predicted.
            assert -0.5 <= have.box[0] <= 1.5 and -0.5 <= have.box[1] <= 1.5


def targets_of(*boxes: tuple[float, float, float, float]) -> Targets:
    count = len(boxes)
    zeros = torch.zeros(count, dtype=torch.int64)
    return Targets(zeros, zeros, torch.tensor(boxes).reshape(count, 4))


def cells_of(targets: Targets, side: int = 4) -> set[tuple[int, int]]:
    """Rows and columns that answer, for one level of 8 px cells with one 16 px anchor."""
    (matches,) = match_anchors(targets, torch.tensor([[[16.0, 16.0]]]), [8], [(side, side)])
    return set(zip(matches.row.tolist(), matches.column.tolist(), strict=True))


@pytest.mark.parametrize(
    ("centre", "cells"),
    [
        ((14, 14), {(1, 1), (1, 2), (2, 1)}),  # lower right of its cell
        ((10, 10), {(1, 1), (0, 1), (1, 0)}),  # upper left
        ((10, 14), {(1, 1), (1, 0), (2, 1)}),
        ((12, 12), {(1, 1)}),  # the middle is near to neither side
        ((2, 2), {(0, 0)}),  # no neighbour over the border
        ((30, 30), {(3, 3)}),
        ((8, 8), {(1, 1)}),  # on the edge that the first two cells share
    ],
)
def test_the_cells_that_answer(centre, cells):
    x, y = centre
    assert cells_of(targets_of((x - 8, y - 8, x + 8, y + 8))) == cells


@pytest.mark.parametrize(
    ("width", "matches"), [(4, False), (4.25, True), (63.75, True), (64, False)]
)
def test_the_factor_of_four(width, matches):
    box = (128 - width / 2, 120, 128 + width / 2, 136)
    assert bool(cells_of(targets_of(box), side=32)) == matches


def test_a_centre_on_the_far_border_stays_inside():
    (matches,) = match_anchors(
        targets_of((24, 24, 40, 40)), torch.tensor([[[16.0, 16.0]]]), [8], [(4, 4)]
    )
    assert matches.row.max() == matches.column.max() == 3


def test_targets_move_between_devices():
    targets = targets_of((0, 0, 8, 8))
    assert [field.device.type for field in targets.to(torch.device("meta"))] == ["meta"] * 3
