"""Task alignment against its published description, written as loops over Python's floats.

The predictions are in 64 bits here: the reference then ranks cells exactly as `align_cells` does.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from convnext_yolo.model.assign import (
    IOU_POWER,
    SCORE_POWER,
    TOP_CELLS,
    Alignment,
    Targets,
    align_cells,
)

KINDS = ("none", "one", "some", "300", "duplicates", "border", "tiny", "huge")
LEAST_PX = st.sampled_from((0.0, 8.0, 24.0))
SEEDS = st.integers(0, 999)
FLOOR = 1e-6  # the IoU that boxes without overlap count as


def cells_of(scene) -> list[tuple[float, float]]:
    """Centres of the cells, level by level, row by row."""
    levels = zip(scene.strides, scene.sizes, strict=True)
    return [
        ((column + 0.5) * stride, (row + 0.5) * stride)
        for stride, (height, width) in levels
        for row in range(height)
        for column in range(width)
    ]


def predictions(scene, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes, scores and centres of a half-trained network: some boxes are an object's, nearly."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor(cells_of(scene), dtype=torch.float64)
    shape = (scene.images, len(centres))

    def random(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    reach = random(*shape, 4) * 48
    boxes = torch.cat((centres - reach[..., :2], centres + reach[..., 2:]), dim=-1)
    for image in range(scene.images):
        own = scene.targets.boxes[scene.targets.image == image].double()
        if len(own):
            near = own[torch.randint(len(own), (len(centres),), generator=generator)]
            near = near + (random(len(centres), 4) - 0.5) * (near[:, 2:] - near[:, :2]).repeat(1, 2)
            boxes[image] = torch.where(random(len(centres), 1) < 0.7, near, boxes[image])
    return boxes, random(*shape, scene.classes), centres


def aligned(scene, seed: int, least_px: float) -> tuple[Alignment, list[dict]]:
    """What `align_cells` finds, and what the reference does."""
    boxes, scores, centres = predictions(scene, seed)
    targets = scene.targets._replace(boxes=scene.targets.boxes.double())
    found = align_cells(targets, boxes, scores, centres, least_px)
    return found, expected(targets, boxes.tolist(), scores.tolist(), centres.tolist(), least_px)


def overlap(a: list[float], b: list[float]) -> float:
    across, down = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return across * down / (areas[0] + areas[1] - across * down)


def is_inside(centre: list[float], box: list[float], least_px: float) -> bool:
    """Whether a cell's centre lies in a box, or in what a small box is taken as."""
    for k in (0, 1):
        half = max(box[k + 2] - box[k], least_px) / 2
        if abs(centre[k] - (box[k] + box[k + 2]) / 2) > half:
            return False
    return True


def expected(targets: Targets, boxes, scores, centres, least_px: float) -> list[dict]:
    """The cells of each object, with their quality, and the IoU that each has."""
    claims: dict[tuple[int, int], list[tuple[float, int, float]]] = {}
    objects = list(zip(*(field.tolist() for field in targets), strict=True))
    for number, (image, label, box) in enumerate(objects):
        mine = []
        for cell, centre in enumerate(centres):
            if is_inside(centre, box, least_px):
                iou = max(overlap(box, boxes[image][cell]), FLOOR)
                metric = scores[image][cell][label] ** SCORE_POWER * iou**IOU_POWER
                mine.append((metric, cell, iou))
        for metric, cell, iou in sorted(mine, reverse=True)[:TOP_CELLS]:
            claims.setdefault((image, cell), []).append((iou, -number, metric))
    won: list[dict[int, tuple[float, float]]] = [{} for _ in objects]
    for (_, cell), rivals in claims.items():
        iou, number, metric = max(rivals)  # the largest overlap, of equal ones the first object
        won[-number][cell] = metric, iou
    for cells in won:
        best_metric = max((metric for metric, _ in cells.values()), default=0.0)
        best_iou = max((iou for _, iou in cells.values()), default=0.0)
        for cell, (metric, iou) in cells.items():
            cells[cell] = metric / best_metric * best_iou, iou
    return won


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, derandomize=True, deadline=None)
@given(data=st.data())
def test_the_assignment_is_the_published_one(scenes, kind, data):
    scene, least_px = data.draw(scenes[kind]), data.draw(LEAST_PX)
    found, want = aligned(scene, data.draw(SEEDS), least_px)
    assert found.image.tolist() == scene.targets.image[found.target].tolist()
    places = list(zip(found.target.tolist(), found.cell.tolist(), strict=True))
    assert sorted(places) == [(n, c) for n, cells in enumerate(want) for c in sorted(cells)]
    assert found.quality.tolist() == pytest.approx([want[n][c][0] for n, c in places], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, derandomize=True, deadline=None)
@given(data=st.data())
def test_what_always_holds(scenes, kind, data):
    """In 32 bits, as in training."""
    scene, least_px = data.draw(scenes[kind]), data.draw(LEAST_PX)
    boxes, scores, centres = (x.float() for x in predictions(scene, data.draw(SEEDS)))
    found = align_cells(scene.targets, boxes, scores, centres, least_px)
    assert len(set(zip(found.image.tolist(), found.cell.tolist(), strict=True))) == len(found.cell)
    assert ((found.quality >= 0) & (found.quality <= 1)).all()
    claimed: dict[int, list[int]] = {}
    for place, number in enumerate(found.target.tolist()):
        claimed.setdefault(number, []).append(place)
    for number, mine in claimed.items():
        assert len(mine) <= TOP_CELLS
        box, image = scene.targets.boxes[number].tolist(), scene.targets.image[number]
        cells = found.cell[mine]
        assert all(is_inside(c, box, least_px) for c in centres[cells].tolist())
        best = max(overlap(box, b) for b in boxes[image, cells].double().tolist())
        assert found.quality[mine].max().item() == pytest.approx(max(best, FLOOR), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, derandomize=True, deadline=None)
@given(data=st.data())
def test_the_order_of_objects_does_not_matter(scenes, kind, data):
    """Where no two overlap a box equally: moved a little, and all of them in reach of all cells."""
    scene, seed = data.draw(scenes[kind]), data.draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    _, scores, centres = predictions(scene, seed)
    reach = torch.tensor([scene.width_px, scene.height_px] * 2)
    reach = reach * (1 + torch.rand(scene.images, len(centres), 4, generator=generator).double())
    boxes = torch.cat((centres - reach[..., :2], centres + reach[..., 2:]), dim=-1)
    moved = torch.rand(scene.targets.boxes.shape, generator=generator).double() * 1e-3
    targets = scene.targets._replace(boxes=scene.targets.boxes + moved)
    order = torch.randperm(len(targets.label), generator=generator)
    first = align_cells(targets, boxes, scores, centres, 8.0)
    second = align_cells(Targets(*(f[order] for f in targets)), boxes, scores, centres, 8.0)
    second = second._replace(target=order[second.target])
    listed = [sorted(zip(*(f.tolist() for f in found), strict=True)) for found in (first, second)]
    assert [row[:3] for row in listed[0]] == [row[:3] for row in listed[1]]
    # Powers differ in the last bit by where in a vector they are taken.
    qualities = [[row[3] for row in rows] for rows in listed]
    assert qualities[0] == pytest.approx(qualities[1], rel=1e-12)


@settings(max_examples=10, derandomize=True, deadline=None)
@given(data=st.data())
def test_pictures_do_not_compete(scenes, data):
    scene = data.draw(scenes["some"])
    boxes, scores, centres = predictions(scene, data.draw(SEEDS))
    together = align_cells(scene.targets, boxes, scores, centres, 8.0)
    for image in range(scene.images):
        own = (scene.targets.image == image).nonzero().squeeze(1)
        targets = Targets(*(field[own] for field in scene.targets))._replace(
            image=torch.zeros_like(own)
        )
        alone = align_cells(targets, boxes[[image]], scores[[image]], centres, 8.0)
        here = together.image == image
        assert torch.equal(alone.cell, together.cell[here])
        assert torch.equal(own[alone.target], together.target[here])
        torch.testing.assert_close(alone.quality, together.quality[here])


def one_row(*boxes: tuple[float, ...], predicted: tuple[float, ...] | None = None):
    """Objects on a row of four 8 px cells that all predict one box, by default the first."""
    truth = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    zeros = torch.zeros(len(truth), dtype=torch.int64)
    box = torch.tensor(predicted or boxes[0]).float().expand(1, 4, 4)
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2])[None, :, None]
    centres = torch.tensor([[4.0, 4], [12, 4], [20, 4], [28, 4]])
    return Targets(zeros, zeros, truth), box, scores, centres


def test_nobody_is_looked_for_where_nothing_is():
    _, *predicted = one_row(predicted=(0, 0, 8, 8))
    empty = torch.zeros(0, dtype=torch.int64)
    found = align_cells(Targets(empty, empty, torch.zeros(0, 4)), *predicted, 8.0)
    assert [len(field) for field in found] == [0] * 4
    assert found.cell.dtype == torch.int64 and found.quality.dtype == torch.float32


def test_the_quality_follows_the_score_where_the_boxes_are_equal():
    found = align_cells(*one_row((0, 0, 32, 8)), 8.0)
    assert found.cell.tolist() == [1, 2, 3, 0]  # by score
    want = (torch.tensor([0.4, 0.3, 0.2, 0.1]) / 0.4) ** SCORE_POWER  # the IoU is 1
    torch.testing.assert_close(found.quality, want)


@pytest.mark.parametrize(
    ("least_px", "cells"), [(0.0, []), (7.9, []), (8.0, [1, 2]), (24.0, [1, 2, 3, 0])]
)
def test_the_smallest_object_still_has_a_cell(least_px, cells):
    speck = (15.5, 3.5, 16.5, 4.5)  # between the centres of two cells
    assert align_cells(*one_row(speck), least_px).cell.tolist() == cells


def test_a_cell_goes_to_the_object_that_it_overlaps_most():
    wide, narrow = (0.0, 0, 32, 8), (8.0, 0, 16, 8)
    found = align_cells(*one_row(wide, narrow, predicted=(8, 0, 16, 8)), 8.0)
    assert dict(zip(found.cell.tolist(), found.target.tolist(), strict=True)) == {
        0: 0,
        1: 1,
        2: 0,
        3: 0,
    }
    assert found.quality[found.cell == 1] == 1


def test_of_two_equal_objects_the_first_has_the_cells():
    found = align_cells(*one_row((0, 0, 32, 8), (0, 0, 32, 8)), 8.0)
    assert found.target.tolist() == [0] * 4


def test_an_object_that_nothing_overlaps_has_cells():
    found = align_cells(*one_row((0, 0, 32, 8), predicted=(500, 500, 600, 600)), 8.0)
    assert len(found.cell) == 4
    assert (found.quality > 0).all() and (found.quality <= FLOOR).all()


def test_an_object_has_a_cell_whatever_the_score():
    targets, boxes, scores, centres = one_row((0, 0, 32, 8), predicted=(500, 500, 600, 600))
    assert len(align_cells(targets, boxes, scores * 1e-20, centres, 8.0).cell) == 4


def test_no_gradient_goes_through_the_assignment():
    targets, boxes, scores, centres = one_row((0, 0, 32, 8))
    boxes, scores = boxes.clone().requires_grad_(), scores.clone().requires_grad_()
    assert not align_cells(targets, boxes, scores, centres, 8.0).quality.requires_grad
