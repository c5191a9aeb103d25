"""The losses against the published description, written as loops over Python's floats."""

import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from convnext_yolo.model.assign import Matches, Targets, match_anchors
from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.head import AnchorHead
from convnext_yolo.model.losses import AnchorCriterion

KINDS = ("none", "one", "some", "300", "duplicates", "border", "tiny", "huge")
GAINS = {"box": 0.05, "obj": 1.0, "cls": 0.5}
CRITERION = AnchorCriterion(*GAINS.values())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def cross_entropy(logit: float, target: float) -> float:
    return max(logit, 0) - logit * target + math.log1p(math.exp(-abs(logit)))


def complete_iou(first: Sequence[float], second: Sequence[float], eps: float = 1e-7) -> float:
    """Of boxes given by centre and size."""
    (x1, y1, w1, h1), (x2, y2, w2, h2) = first, second
    across = min(x1 + w1 / 2, x2 + w2 / 2) - max(x1 - w1 / 2, x2 - w2 / 2)
    down = min(y1 + h1 / 2, y2 + h2 / 2) - max(y1 - h1 / 2, y2 - h2 / 2)
    both = max(across, 0) * max(down, 0)
    iou = both / (w1 * h1 + w2 * h2 - both + eps)
    hull_w = max(x1 + w1 / 2, x2 + w2 / 2) - min(x1 - w1 / 2, x2 - w2 / 2)
    hull_h = max(y1 + h1 / 2, y2 + h2 / 2) - min(y1 - h1 / 2, y2 - h2 / 2)
    apart = ((x1 - x2) ** 2 + (y1 - y2) ** 2) / (hull_w**2 + hull_h**2 + eps)
    v = 4 / math.pi**2 * (math.atan(w2 / (h2 + eps)) - math.atan(w1 / (h1 + eps))) ** 2
    return iou - apart - v * v / (v - iou + 1 + eps)


def expected(head: AnchorHead, raw: Sequence[torch.Tensor], found: Sequence[Matches]):
    """The three losses of raw maps and their positives."""
    box = obj = cls = 0.0
    for level, matches, balance in zip(raw, found, (4.0, 1.0, 0.4), strict=True):
        overlap: dict[tuple[int, ...], float] = {}
        box_sum = cls_sum = 0.0
        for *at, label, want, size in zip(*(field.tolist() for field in matches), strict=True):
            logits = level[tuple(at)].tolist()
            x, y, w, h = map(sigmoid, logits[:4])
            have = (2 * x - 0.5, 2 * y - 0.5, (2 * w) ** 2 * size[0], (2 * h) ** 2 * size[1])
            iou = complete_iou(have, want)
            box_sum += 1 - iou
            overlap[tuple(at)] = max(iou, 0)  # the last of several objects wins
            for k, logit in enumerate(logits[5:]):
                cls_sum += cross_entropy(logit, float(k == label))
        count = len(matches.image)
        if count:
            box += box_sum / count
            cls += cls_sum / (count * head.classes) if head.classes > 1 else 0
        images, anchors, height, width, _ = level.shape
        total = 0.0
        objectness = level[..., 4].tolist()
        for b in range(images):
            for a in range(anchors):
                for row in range(height):
                    for column in range(width):
                        target = overlap.get((b, a, row, column), 0.0)
                        total += cross_entropy(objectness[b][a][row][column], target)
        obj += balance * total / (images * anchors * height * width)
    area = raw[0].shape[2] * raw[0].shape[3] * 8 * 8
    return {
        "box": box * GAINS["box"],
        "obj": obj * GAINS["obj"] * area / 640**2,
        "cls": cls * GAINS["cls"] * head.classes / 80,
    }


def head_of(scene) -> AnchorHead:
    return AnchorHead((4, 4, 4), scene.classes, scene.anchors, scene.strides)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, derandomize=True, deadline=None)
@given(data=st.data())
def test_the_losses_are_the_published_ones(scenes, kind, data):
    scene = data.draw(scenes[kind])
    # From a fresh network to one that is sure of everything.
    raw = scene.logits(data.draw(st.integers(0, 999)), data.draw(st.sampled_from((0.0, 1.0, 9.0))))
    for level in raw:
        level.requires_grad_()
    head = head_of(scene)
    losses = CRITERION(head, raw, scene.targets)
    found = match_anchors(scene.targets, head.anchors, head.strides, scene.sizes)
    for name, want in expected(head, raw, found).items():
        assert losses[name].shape == ()
        assert losses[name].item() == pytest.approx(want, rel=2e-5, abs=1e-7), name
    sum(losses.values()).backward()
    assert all(level.grad.isfinite().all() for level in raw)


@pytest.mark.parametrize("logit", [-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
def test_gradients_stay_finite_far_out(logit):
    """Boxes of no size and of 16 times an anchor's area, scores of exactly 0 and 1."""
    scene = Targets(
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 2, 1]),
        torch.tensor([[0.0, 0, 16, 16], [30, 20, 31, 21], [0, 0, 96, 64]]),
    )
    head = AnchorHead((4, 4, 4), 3, [[[12, 9]], [[16, 20]], [[60, 90]]], (8, 16, 32))
    raw = [torch.full((2, 1, 64 // s, 96 // s, 8), logit, requires_grad=True) for s in (8, 16, 32)]
    losses = CRITERION(head, raw, scene)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(level.grad.isfinite().all() for level in raw)


def test_gradients_reach_what_a_loss_is_about():
    head = AnchorHead((4, 4, 4), 3, [[[12, 9]], [[16, 20]], [[60, 90]]], (8, 16, 32))
    targets = Targets(torch.tensor([0]), torch.tensor([2]), torch.tensor([[10.0, 10, 25, 24]]))
    reached = {}
    for name in GAINS:
        raw = [torch.zeros(1, 1, 64 // s, 96 // s, 8, requires_grad=True) for s in (8, 16, 32)]
        CRITERION(head, raw, targets)[name].backward()
        reached[name] = [k for k in range(8) if raw[0].grad[..., k].any()]
        everywhere = bool((raw[0].grad[..., 4] != 0).all())
        assert everywhere == (name == "obj")
    assert reached == {"box": [0, 1, 2, 3], "obj": [4], "cls": [5, 6, 7]}


def test_an_image_without_objects_trains(architecture):
    torch.manual_seed(0)
    detector = build_detector(architecture)
    nothing = Targets(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0, 4))
    raw = detector(torch.rand(1, 3, 64, 64))
    losses = CRITERION(detector.head, raw.levels, nothing)
    assert losses["box"] == losses["cls"] == 0 < losses["obj"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_one_class_needs_no_class_loss():
    head = AnchorHead((4, 4, 4), 1, [[[12, 9]], [[16, 20]], [[60, 90]]], (8, 16, 32))
    targets = Targets(torch.tensor([0]), torch.tensor([0]), torch.tensor([[10.0, 10, 25, 24]]))
    raw = [torch.zeros(1, 1, 64 // s, 96 // s, 6) for s in (8, 16, 32)]
    losses = CRITERION(head, raw, targets)
    assert losses["cls"] == 0 < losses["box"]


def test_half_precision_maps_have_full_precision_losses():
    head = AnchorHead((4, 4, 4), 3, [[[12, 9]], [[16, 20]], [[60, 90]]], (8, 16, 32))
    targets = Targets(torch.tensor([0]), torch.tensor([2]), torch.tensor([[10.0, 10, 25, 24]]))
    torch.manual_seed(0)
    raw = [torch.randn(1, 1, 64 // s, 96 // s, 8).bfloat16() for s in (8, 16, 32)]
    half = CRITERION(head, raw, targets)
    full = CRITERION(head, [level.float() for level in raw], targets)
    assert half == full and all(loss.dtype == torch.float32 for loss in half.values())


def test_the_bias_starts_at_few_objects():
    """About 8 objects a 640 px image, as published."""
    torch.manual_seed(0)
    head = AnchorHead((4, 4, 4), 3, [[[12, 9]], [[16, 20]], [[60, 90]]], (8, 16, 32))
    with torch.no_grad():
        raw = head([torch.zeros(1, 4, 640 // s, 640 // s) for s in (8, 16, 32)])
    sums = [level[..., 4].sigmoid().sum().item() for level in raw]
    assert sums == pytest.approx([8, 8, 8], rel=0.7)  # the convolutions' own biases remain
