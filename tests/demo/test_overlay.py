"""Colours, labels and places of the drawn boxes."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from convnext_yolo.demo.overlay import (
    class_colour,
    draw_boxes,
    label_text,
    luminance,
    svg_overlay,
)
from convnext_yolo.model.postprocess import Detections

NAMES = ["cell", "<script>alert('&')</script>", "猫", "tab\tnew\nline\x00"]


def detections(*boxes: tuple[float, float, float, float, float, int]) -> Detections:
    table = torch.tensor(boxes).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


def rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def test_colours_are_stable_distinct_and_legible() -> None:
    colours = [class_colour(index) for index in range(80)]
    assert colours == [class_colour(index) for index in range(80)]
    assert len(set(colours)) == 80
    first = np.array([rgb(colour) for colour in colours[:12]]).astype(int)
    gaps = np.abs(first[:, None] - first[None]).sum(-1) + 1000 * np.eye(12)
    assert gaps.min() > 40
    for colour in colours:
        contrast = 1.05 / (luminance([channel / 255 for channel in rgb(colour)]) + 0.05)
        assert contrast >= 4.5, colour


def test_svg_has_each_box_at_its_place_with_escaped_labels() -> None:
    found = detections((10, 20, 110, 70, 0.9, 1), (0, 0, 200, 100, 0.5, 0))
    root = ET.fromstring(svg_overlay(found, 200, 100, NAMES))  # well-formed
    groups = root.findall("g")
    assert len(groups) == 2 and root.get("aria-hidden") == "true"
    best = groups[-1]  # on top
    line = next(rect for rect in best.findall("rect") if rect.get("class") == "line")
    assert [line.get(key) for key in ("x", "y", "width", "height")] == [
        "5.000%",
        "20.000%",
        "50.000%",
        "50.000%",
    ]
    assert line.get("stroke") == class_colour(1)
    assert best.findtext("title") == "<script>alert('&')</scr… 0.90"


@pytest.mark.parametrize("box", [(0, 0, 3, 3), (190, 90, 200, 100), (100, 50, 100, 50)])
def test_svg_labels_stay_inside(box: tuple[float, ...]) -> None:
    root = ET.fromstring(svg_overlay(detections((*box, 0.5, 0)), 200, 100, NAMES))
    label = root.find("svg")
    rect = root.find("svg/rect")
    assert label is not None and rect is not None
    to_the_left = float(rect.get("x", "")) < 0
    assert to_the_left == (box[0] > 120)
    above = float(rect.get("y", "")) < 0
    assert above == (box[1] > 7)


def test_svg_tells_how_dense_it_is() -> None:
    box = (0, 0, 9, 9, 0.5, 0)
    for count, density in ((0, "few"), (12, "few"), (13, "many"), (60, "many"), (61, "crowd")):
        assert f'class="overlay {density}"' in svg_overlay(detections(*[box] * count), 9, 9, NAMES)


def test_label_texts() -> None:
    assert label_text("cell", 0.987) == "cell 0.99"
    assert label_text("a" * 40, 1) == "a" * 23 + "… 1.00"
    assert label_text(NAMES[3], 0.5) == "tab new line  0.50"


def test_drawing_marks_the_box_and_leaves_the_array_alone() -> None:
    picture = np.full((100, 200, 3), 200, np.uint8)
    image = draw_boxes(picture, detections((50, 40, 150, 90, 0.9, 2)), NAMES)
    assert (picture == 200).all()
    drawn = np.asarray(image)
    assert drawn.shape == picture.shape
    assert tuple(drawn[65, 50]) == tuple(drawn[90, 100]) == rgb(class_colour(2))
    assert (drawn[60:80, 60:140] == 200).all()  # not filled
    assert (drawn[25:40, 50:60] != 200).any()  # the label above


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (7, 7)])
def test_draws_on_tiny_pictures(size: tuple[int, int]) -> None:
    picture = np.zeros((*size, 3), np.uint8)
    found = detections((0, 0, size[1], size[0], 0.9, 0), (0.5, 0.5, 0.5, 0.5, 0.4, 1))
    assert draw_boxes(picture, found, NAMES).size == size[::-1]


def test_draws_nothing_where_nothing_is() -> None:
    picture = np.full((10, 10, 3), 7, np.uint8)
    assert (np.asarray(draw_boxes(picture, detections(), NAMES)) == 7).all()
    assert "<g" not in svg_overlay(detections(), 10, 10, NAMES)
