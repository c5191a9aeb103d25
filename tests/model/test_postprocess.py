from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from convnext_yolo.model import postprocess as module
from convnext_yolo.model.letterbox import Letterbox
from convnext_yolo.model.postprocess import (
    MAX_CANDIDATES,
    MAX_DETECTIONS,
    Candidates,
    Detections,
    candidates,
    suppress,
)

WHOLE = Letterbox(scale=1.0, left_px=0, top_px=0, width_px=100_000, height_px=100_000)


def postprocess(
    boxes: torch.Tensor, scores: torch.Tensor, confidence: float, iou: float
) -> list[Detections]:
    found = candidates(boxes, scores, [WHOLE] * len(boxes), confidence)
    return [picture.suppress(confidence, iou) for picture in found]


def candidates_of_one(boxes: torch.Tensor, scores: torch.Tensor, confidence: float) -> Detections:
    (picture,) = candidates(boxes[None], scores[None], [WHOLE], confidence)
    return picture.found


def reference_nms(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float
) -> list[int]:
    """Class by class: take the best, drop what overlaps it, go on; then all classes by score."""
    kept = []
    for label in np.unique(labels):
        left = [i for i in np.argsort(-scores, kind="stable") if labels[i] == label]
        while left:
            best, *left = left
            kept.append(int(best))
            left = [i for i in left if overlap(boxes[best], boxes[i]) <= iou]
    return sorted(sorted(kept), key=lambda i: -scores[i])


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    size = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    both = float(size.prod())
    return both / float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


def random_detections(seed: int, count: int, classes: int) -> Detections:
    """Crowded, reaching over every border of a 200 px picture, with many equal scores."""
    rng = np.random.default_rng(seed)
    centre, size = rng.uniform(-20, 220, (count, 2)), rng.uniform(20, 120, (count, 2))
    boxes = np.concatenate((centre - size / 2, centre + size / 2), axis=1)
    return Detections(
        torch.from_numpy(boxes.astype(np.float32)),
        torch.from_numpy(rng.integers(1, 40, count).astype(np.float32) / 40),
        torch.from_numpy(rng.integers(classes, size=count)),
    )


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 80),
    classes=st.sampled_from((1, 2, 80)),
    iou=st.sampled_from((0.0, 0.3, 0.45, 0.65, 1.0)),
)
def test_suppression_is_the_plain_one_of_each_class(seed, count, classes, iou):
    found = random_detections(seed, count, classes)
    kept = suppress(found, 0.0, iou)
    want = reference_nms(found.boxes.numpy(), found.scores.numpy(), found.labels.numpy(), iou)
    assert torch.equal(kept.boxes, found.boxes[want])
    assert torch.equal(kept.scores, found.scores[want])
    assert torch.equal(kept.labels, found.labels[want])


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 40),
    classes=st.sampled_from((1, 3)),
    confidence=st.sampled_from((0.0, 0.25, 0.5)),
    iou=st.sampled_from((0.3, 0.65)),
    most=st.sampled_from((1, 7, 1000)),
)
def test_the_whole_way_is_the_plain_one(seed, count, classes, confidence, iou, most):
    """Scores of all classes in, the best `most` of all classes out, in the picture's pixels."""
    boxes = random_detections(seed, count, 1).boxes
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(0, 41, (count, classes)).astype(np.float32) / 40)
    frame = Letterbox(scale=0.5, left_px=10, top_px=20, width_px=380, height_px=300)
    with mock.patch.object(module, "MAX_DETECTIONS", most):
        (found,) = candidates(boxes[None], scores[None], [frame], confidence / 2)
        kept = found.suppress(confidence, iou)

    rows = [
        (box, score, label)
        for box, by_class in zip(boxes.numpy(), scores.tolist(), strict=True)
        for label, score in enumerate(by_class)
        if score > confidence
    ]
    flat, score, label = (np.array([row[k] for row in rows]) for k in range(3))
    best = reference_nms(flat, score, label, iou)[:most]
    assert kept.labels.tolist() == [rows[i][2] for i in best]
    assert kept.scores.tolist() == pytest.approx([rows[i][1] for i in best])
    for box, i in zip(kept.boxes.tolist(), best, strict=True):
        x1, y1, x2, y2 = rows[i][0].tolist()
        placed = [(x1 - 10) / 0.5, (y1 - 20) / 0.5, (x2 - 10) / 0.5, (y2 - 20) / 0.5]
        inside = [min(max(v, 0), side) for v, side in zip(placed, (380, 300) * 2, strict=True)]
        assert box == pytest.approx(inside, abs=1e-3)


def test_one_class_can_take_all_places():
    """The limit is on all classes together, best first, not on each."""
    count = MAX_DETECTIONS
    corner = torch.arange(count).float()[:, None] * 20
    boxes = torch.cat((corner, corner, corner + 10, corner + 10), dim=1)  # none overlap
    scores = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    scores[:, 1] = 0.5 + scores[:, 1] / 2
    scores[:, 0] /= 4
    (found,) = postprocess(boxes[None], scores[None], 0.0, 0.45)
    assert len(found) == MAX_DETECTIONS and (found.labels == 1).all()


def test_boxes_over_the_border_do_not_meet_other_classes():
    """torchvision's batched_nms drops the second: the classes it moves apart overlap there."""
    boxes = torch.tensor([[620.0, 620, 900, 900], [-300, -300, -20, -20], [0, 0, 919, 919]])
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.5]), torch.tensor([0, 1, 0]))
    assert len(suppress(found, 0.0, 0.45)) == 3


def test_tiny_boxes_of_a_high_class_keep_their_precision():
    boxes = torch.tensor([[10.0, 10, 10.6, 10.6], [10.3, 10, 10.9, 10.6], [0, 0, 4000, 4000]])
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.5]), torch.tensor([79, 79, 0]))
    assert len(suppress(found, 0.0, 0.32)) == 2  # their IoU is a third
    assert len(suppress(found, 0.0, 0.34)) == 3


@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.99])
def test_a_slider_gives_what_a_new_run_would(confidence):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 2, generator=generator) * 100
    boxes = torch.cat((corner, corner + 20), dim=1)
    scores = torch.rand(200, 3, generator=generator)
    once = candidates_of_one(boxes, scores, 0.01)
    from_slider = suppress(once, confidence, 0.45)
    (again,) = postprocess(boxes[None], scores[None], confidence, 0.45)
    assert torch.equal(from_slider.boxes, again.boxes)
    assert torch.equal(from_slider.scores, again.scores)
    assert (again.scores > confidence).all()


def test_a_box_counts_once_for_each_class_it_scores_in():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 60, 60]]])
    scores = torch.tensor([[[0.9, 0.6, 0.1], [0.2, 0.3, 0.7]]])
    (found,) = postprocess(boxes, scores, 0.25, 0.45)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6, 0.3])
    assert found.labels.tolist() == [0, 2, 1, 1]
    assert found.boxes[:, 0].tolist() == [0, 50, 0, 50]


def test_the_threshold_itself_is_out():
    found = candidates_of_one(torch.zeros(2, 4), torch.tensor([[0.5], [0.5001]]), 0.5)
    assert len(found) == 1


def test_the_published_limits():
    assert (MAX_CANDIDATES, MAX_DETECTIONS) == (30_000, 300)


def test_no_more_than_the_most():
    count = 2 * MAX_DETECTIONS
    corner = torch.arange(count).float()[:, None] * 20
    boxes = torch.cat((corner, corner, corner + 10, corner + 10), dim=1)  # none overlap
    scores = torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
    (found,) = postprocess(boxes[None], scores[None], 0.0, 0.45)
    assert len(found) == MAX_DETECTIONS
    assert torch.equal(found.scores, scores[:, 0].sort(descending=True).values[:MAX_DETECTIONS])


def test_only_the_best_candidates_of_very_many():
    scores = torch.rand(MAX_CANDIDATES, 2, generator=torch.Generator().manual_seed(0))
    found = candidates_of_one(torch.zeros(MAX_CANDIDATES, 4), scores, 0.0)
    assert len(found) == MAX_CANDIDATES
    assert torch.equal(found.scores, scores.flatten().sort(descending=True).values[:MAX_CANDIDATES])


@pytest.mark.parametrize("boxes", [0, 5])
def test_nothing_found(boxes):
    results = postprocess(torch.zeros(2, boxes, 4), torch.zeros(2, boxes, 3), 0.25, 0.45)
    assert [len(found) for found in results] == [0, 0]
    for found in results:
        assert found.boxes.shape == (0, 4)
        assert found.labels.dtype == torch.int64
    assert len(suppress(results[0], 0.5, 0.5)) == 0


def test_images_of_a_batch_do_not_mix():
    boxes = torch.tensor([[[0.0, 0, 10, 10]], [[0, 0, 10, 10]]])
    first, second = postprocess(boxes, torch.tensor([[[0.9]], [[0.8]]]), 0.1, 0.1)
    assert (first.scores.item(), second.scores.item()) == pytest.approx((0.9, 0.8))


def test_the_network_output_may_want_gradients():
    boxes = torch.rand(1, 3, 4, requires_grad=True)
    (found,) = postprocess(boxes, torch.ones(1, 3, 1), 0.5, 0.5)
    assert not found.boxes.requires_grad


def test_back_to_the_picture():
    frame = Letterbox(scale=0.5, left_px=10, top_px=0, width_px=100, height_px=200)
    boxes = torch.tensor([[10.0, -8, 35, 50], [0, 0, 20, 20]])
    found = Detections(boxes, torch.tensor([0.9, 0.2]), torch.tensor([1, 0]))
    placed = Candidates(found, frame).suppress(0.5, 0.5)
    assert placed.boxes.tolist() == [[0, 0, 50, 100]]  # clipped to the picture
    assert placed.scores.tolist() == pytest.approx([0.9]) and placed.labels.tolist() == [1]
