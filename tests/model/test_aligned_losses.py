"""The anchor-free losses against their published description, positive by positive, in 64 bits.

The assignment is taken as `align_cells` gives it; test_aligned_assign.py is about that.
"""

from collections import Counter
from collections.abc import Sequence
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torchvision.ops import complete_box_iou_loss

from convnext_yolo.model import losses
from convnext_yolo.model.assign import Alignment, Targets
from convnext_yolo.model.head import AlignedHead
from convnext_yolo.model.losses import AlignedCriterion, distribution_focal_loss

KINDS = ("none", "one", "some", "300", "duplicates", "border", "tiny", "huge")
GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
BINS = 6
CRITERION = AlignedCriterion(**GAINS)
SEEDS = st.integers(0, 999)
NOTHING = Targets(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0, 4))


def head_of(classes: int) -> AlignedHead:
    return AlignedHead((8, 8, 8), classes, width=8, depth=1, bins=BINS, strides=(8, 16, 32))


def raw_maps(
    seed: int, scale: float, images: int, classes: int, height_px: int = 64, width_px: int = 96
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(height_px // s, width_px // s) for s in (8, 16, 32)]
    shapes = [(images, h, w, 4 * BINS + classes) for h, w in sizes]
    return [(torch.randn(s, generator=generator) * scale).requires_grad_() for s in shapes]


def criterion_and_assignment(
    head: AlignedHead, raw: Sequence[torch.Tensor], targets: Targets
) -> tuple[dict[str, torch.Tensor], Alignment]:
    """The losses, and the assignment that they were taken with."""
    with mock.patch.object(losses, "align_cells", wraps=losses.align_cells) as spied:
        result = CRITERION(head, raw, targets)
    (call,) = spied.call_args_list
    return result, losses.align_cells(*call.args, **call.kwargs)


def shares(distance: float, bins: int) -> list[float]:
    """What each bin should hold: equation 6 of Li et al., 2020; the last is just out of reach."""
    distance = min(max(distance, 0.0), bins - 1 - 0.01)
    lower = int(distance)
    result = [0.0] * bins
    result[lower], result[lower + 1] = lower + 1 - distance, distance - lower
    return result


def expected(
    raw: Sequence[torch.Tensor], targets: Targets, found: Alignment
) -> dict[str, torch.Tensor]:
    """The three losses in 64 bits, with their gradients."""
    places = [
        (level, row, column)
        for level, maps in enumerate(raw)
        for row in range(maps.shape[1])
        for column in range(maps.shape[2])
    ]
    wanted = [torch.zeros_like(level[..., 4 * BINS :]) for level in raw]
    box = dfl = torch.zeros((), dtype=torch.float64)
    total, of_object = 0.0, Counter[int]()
    for number, quality in zip(found.target.tolist(), found.quality.tolist(), strict=True):
        of_object[number] += quality
    for image, cell, number, quality in zip(*(f.tolist() for f in found), strict=True):
        level, row, column = places[cell]
        stride = 8 * 2**level
        wanted[level][image, row, column, targets.label[number]] = quality
        total += quality
        sides = raw[level][image, row, column, : 4 * BINS].view(4, BINS)
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        left, top, right, bottom = (sides.softmax(1) * torch.arange(BINS)).sum(1) * stride
        have = torch.stack((x - left, y - top, x + right, y + bottom))
        want = targets.boxes[number].double()
        quality = quality / of_object[number] / len(targets.label)
        box = box + quality * complete_box_iou_loss(have, want)
        x1, y1, x2, y2 = want.tolist()
        distances = (x - x1, y - y1, x2 - x, y2 - y)
        held = torch.tensor([shares(d / stride, BINS) for d in distances], dtype=torch.float64)
        dfl = dfl - quality * (held * sides.log_softmax(1)).sum() / 4
    total = max(total, 1.0)
    cls = torch.zeros((), dtype=torch.float64)
    for maps, quality in zip(raw, wanted, strict=True):
        logits = maps[..., 4 * BINS :]
        # -q·log(p) - (1 - q)·log(1 - p), where -log(p) = log(1 + e^-x)
        cross = quality * (-logits).exp().log1p() + (1 - quality) * logits.exp().log1p()
        cls = cls + cross.sum()
    return {
        "box": box * GAINS["box"],
        "cls": cls / total * GAINS["cls"],
        "dfl": dfl * GAINS["dfl"],
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, derandomize=True, deadline=None)
@given(data=st.data())
def test_the_losses_and_their_gradients_are_the_published_ones(scenes, kind, data):
    scene = data.draw(scenes[kind])
    # From a fresh network to one that is sure of everything.
    scale = data.draw(st.sampled_from((0.0, 1.0, 6.0)))
    raw = raw_maps(data.draw(SEEDS), scale, scene.images, scene.classes)
    result, found = criterion_and_assignment(head_of(scene.classes), raw, scene.targets)
    doubles = [level.detach().double().requires_grad_() for level in raw]
    want = expected(doubles, scene.targets, found)
    assert tuple(result) == CRITERION.names
    for name, loss in want.items():
        assert result[name].shape == () and result[name].dtype == torch.float32
        assert result[name].item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-6), name
    sum(result.values()).backward()
    sum(want.values()).backward()
    for level, double in zip(raw, doubles, strict=True):
        assert level.grad.isfinite().all()
        torch.testing.assert_close(level.grad.double(), double.grad, rtol=1e-3, atol=1e-4)


def test_the_assignment_sees_what_decoding_gives():
    head, raw = head_of(3), raw_maps(0, 2.0, 2, 3)
    targets = Targets(torch.tensor([1]), torch.tensor([2]), torch.tensor([[10.0, 10, 40, 34]]))
    with mock.patch.object(losses, "align_cells", wraps=losses.align_cells) as spied:
        CRITERION(head, raw, targets)
    (call,) = spied.call_args_list
    seen, boxes, scores, centres = call.args[:4]
    want_boxes, want_scores = head.decode(raw)
    assert seen is targets and torch.equal(centres, head.cells(raw)[0])
    assert torch.equal(boxes, want_boxes) and torch.equal(scores, want_scores)
    assert not boxes.requires_grad and not scores.requires_grad


SOME = Targets(
    torch.tensor([0, 0, 2]),
    torch.tensor([0, 2, 1]),
    torch.tensor([[0.0, 0, 16, 16], [30, 20, 31, 21], [0, 0, 96, 64]]),
)


def test_gradients_reach_what_a_loss_is_about_and_nothing_else():
    head = head_of(3)
    for name in CRITERION.names:
        raw = raw_maps(0, 1.0, 3, 3)
        result, found = criterion_and_assignment(head, raw, SOME)
        result[name].backward()
        grad = torch.cat([level.grad.flatten(1, 2) for level in raw], dim=1)  # [B, M, 4·R + C]
        positive = torch.zeros(grad.shape[:2], dtype=torch.bool)
        positive[found.image, found.cell] = True
        assert positive.sum() == len(found.cell) > 10
        distances, logits = grad.split((4 * BINS, 3), dim=-1)
        if name == "cls":
            assert (logits != 0).all() and not distances.any()
        else:
            assert (distances[positive] != 0).all(), name
            assert not distances[~positive].any() and not logits.any()


def test_the_better_the_match_the_more_a_positive_counts():
    """A cell that predicts its object exactly has the highest target, and pulls the hardest."""
    head, raw = head_of(1), raw_maps(0, 0.0, 1, 1)
    with torch.no_grad():
        sides = raw[0][0, 3, 4, : 4 * BINS].view(4, BINS)
        sides[:, 2] = 50  # two strides to each side of the centre (36, 28)
    targets = Targets(torch.tensor([0]), torch.tensor([0]), torch.tensor([[20.0, 12, 52, 44]]))
    result, found = criterion_and_assignment(head, raw, targets)
    assert found.cell[found.quality.argmax()] == 3 * 12 + 4
    assert found.quality.max().item() == pytest.approx(1, abs=1e-5)
    result["cls"].backward()
    grad = raw[0].grad[0, :, :, -1]
    assert grad.argmin() == 3 * 12 + 4 and grad.min() < 0


def test_a_batch_without_objects_trains():
    raw = raw_maps(0, 1.0, 2, 3)
    result = CRITERION(head_of(3), raw, NOTHING)
    assert result["box"] == result["dfl"] == 0 < result["cls"]
    sum(result.values()).backward()
    for level in raw:
        assert level.grad.isfinite().all()
        assert (level.grad[..., 4 * BINS :] > 0).all()  # every score goes down
        assert not level.grad[..., : 4 * BINS].any()


def test_an_image_without_objects_beside_one_with_some():
    raw = raw_maps(0, 1.0, 3, 3)
    sum(CRITERION(head_of(3), raw, SOME).values()).backward()
    for level in raw:
        assert level.grad.isfinite().all()
        assert (level.grad[1, ..., 4 * BINS :] > 0).all()
        assert not level.grad[1, ..., : 4 * BINS].any()


@settings(max_examples=10, derandomize=True, deadline=None)
@given(data=st.data())
def test_the_order_of_pictures_does_not_matter(scenes, data):
    scene, seed = data.draw(scenes["some"]), data.draw(SEEDS)
    raw = raw_maps(seed, 1.0, scene.images, scene.classes)
    order = torch.randperm(scene.images, generator=torch.Generator().manual_seed(seed))
    head, criterion = head_of(scene.classes), CRITERION
    first = criterion(head, raw, scene.targets)
    mixed = scene.targets._replace(image=order.argsort()[scene.targets.image])
    second = criterion(head, [level[order] for level in raw], mixed)
    for name in criterion.names:
        assert second[name].item() == pytest.approx(first[name].item(), rel=1e-5)


@pytest.mark.parametrize("logit", [-1e4, -50.0, 50.0, 1e4])
def test_gradients_stay_finite_far_out(logit):
    for seed in range(2):  # all logits far out on one side; then some here, some there
        raw = raw_maps(0, 1.0, 3, 3)
        with torch.no_grad():
            for level in raw:
                level.copy_(level.sign() * logit if seed else torch.full_like(level, logit))
        result = CRITERION(head_of(3), raw, SOME)
        assert all(loss.isfinite() and loss >= 0 for loss in result.values())
        sum(result.values()).backward()
        assert all(level.grad.isfinite().all() for level in raw)


def test_half_precision_maps_have_full_precision_losses():
    raw = [level.detach().bfloat16() for level in raw_maps(0, 1.0, 3, 3)]
    half = CRITERION(head_of(3), raw, SOME)
    full = CRITERION(head_of(3), [level.float() for level in raw], SOME)
    assert half == full and all(loss.dtype == torch.float32 for loss in half.values())


def test_gains_scale_their_losses():
    raw = raw_maps(0, 1.0, 3, 3)
    plain = AlignedCriterion(1, 1, 1)(head_of(3), raw, SOME)
    scaled = CRITERION(head_of(3), raw, SOME)
    for name, gain in GAINS.items():
        assert scaled[name].item() == pytest.approx(plain[name].item() * gain)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(seed=SEEDS, bins=st.integers(2, 16), scale=st.sampled_from((0.0, 1.0, 20.0)))
def test_distribution_focal_loss_is_the_published_one(seed, bins, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, bins, generator=generator) * scale
    # Inside and out of reach, whole and broken.
    distances = (torch.rand(5, 4, generator=generator) * 1.5 - 0.25) * (bins - 1)
    distances[0] = distances[0].round()
    loss = distribution_focal_loss(logits, distances)
    assert loss.shape == (5,)
    for k in range(5):
        held = torch.tensor([shares(d, bins) for d in distances[k].tolist()], dtype=torch.float64)
        want = -(held * logits[k].double().log_softmax(1)).sum().item() / 4
        assert loss[k].item() == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_distribution_focal_loss_is_least_where_the_mean_is_the_distance():
    """A distance of 2.25 bins is learnt as three quarters of bin 2 and one of bin 3."""
    learnt = torch.tensor([1e-9, 1e-9, 0.75, 0.25, 1e-9])
    logits = learnt.log().expand(1, 4, 5).clone().requires_grad_()
    distribution_focal_loss(logits, torch.full((1, 4), 2.25)).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, 4, 5), rtol=0, atol=1e-6)


def test_distribution_focal_loss_of_nothing():
    assert distribution_focal_loss(torch.zeros(0, 4, 5), torch.zeros(0, 4)).shape == (0,)
