"""The two heads' decoding against the published one, cell by cell over Python's floats."""

import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from convnext_yolo.model.boxes import xyxy_to_cxcywh
from convnext_yolo.model.head import AlignedHead, AnchorHead, cell_grid

STRIDES = (8, 16, 32)
SIZES = ((6, 10), (3, 5), (2, 3))  # cells of the levels, no two sides alike
CELLS = sum(height * width for height, width in SIZES)
CLASSES, BINS = 3, 7
CHANNELS = (8, 16, 24)
ANCHORS = (((10, 13), (16, 30)), ((30, 61), (62, 45)), ((116, 90), (156, 198)))


@pytest.fixture(scope="module")
def anchor_head() -> AnchorHead:
    torch.manual_seed(0)
    return AnchorHead(CHANNELS, CLASSES, ANCHORS, STRIDES)


@pytest.fixture(scope="module")
def aligned_head() -> AlignedHead:
    torch.manual_seed(0)
    return AlignedHead(CHANNELS, CLASSES, width=16, depth=2, bins=BINS, strides=STRIDES)


def features(batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    levels = zip(CHANNELS, SIZES, strict=True)
    return [torch.randn(batch, c, *size, generator=generator) for c, size in levels]


def random_maps(*shapes: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(tuple(shape), generator=generator) * 3 for shape in shapes]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(logits: Sequence[float]) -> float:
    """Of the bins 0, 1, 2, … under the distribution that has these logits."""
    weights = [math.exp(x) for x in logits]
    return sum(k * w for k, w in enumerate(weights)) / sum(weights)


def every_cell() -> Iterator[tuple[int, int, int, int]]:
    """Level, stride, row and column."""
    for level, (stride, (height, width)) in enumerate(zip(STRIDES, SIZES, strict=True)):
        for row in range(height):
            for column in range(width):
                yield level, stride, row, column


def test_the_aligned_head_decodes_as_published(aligned_head):
    raw = random_maps(*((2, *size, 4 * BINS + CLASSES) for size in SIZES))
    boxes, scores = aligned_head.decode(raw)
    assert boxes.shape == (2, CELLS, 4) and scores.shape == (2, CELLS, CLASSES)
    for image in range(2):
        for at, (level, stride, row, column) in enumerate(every_cell()):
            logits = raw[level][image, row, column].tolist()
            sides = [mean(logits[k * BINS : (k + 1) * BINS]) * stride for k in range(4)]
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            want = (x - sides[0], y - sides[1], x + sides[2], y + sides[3])
            assert boxes[image, at].tolist() == pytest.approx(want, abs=1e-3)
            classes = [sigmoid(x) for x in logits[4 * BINS :]]
            assert scores[image, at].tolist() == pytest.approx(classes, abs=1e-6)


def test_the_anchor_head_decodes_as_published(anchor_head):
    raw = random_maps(*((2, 2, *size, 5 + CLASSES) for size in SIZES))
    boxes, scores = anchor_head.decode(raw)
    assert boxes.shape == (2, 2 * CELLS, 4) and scores.shape == (2, 2 * CELLS, CLASSES)
    found = list(zip(xyxy_to_cxcywh(boxes).flatten(0, 1), scores.flatten(0, 1), strict=True))
    for image in range(2):
        start = image * 2 * CELLS
        for level, (stride, (height, width)) in enumerate(zip(STRIDES, SIZES, strict=True)):
            for anchor, (anchor_w, anchor_h) in enumerate(ANCHORS[level]):
                for cell in range(height * width):
                    row, column = divmod(cell, width)
                    logits = raw[level][image, anchor, row, column].tolist()
                    x, y, w, h, objectness, *classes = map(sigmoid, logits)
                    box, score = found[start + cell]
                    centre = [(2 * x - 0.5 + column) * stride, (2 * y - 0.5 + row) * stride]
                    size = [(2 * w) ** 2 * anchor_w, (2 * h) ** 2 * anchor_h]
                    assert box.tolist() == pytest.approx(centre + size, abs=1e-3)
                    want = [objectness * c for c in classes]
                    assert score.tolist() == pytest.approx(want, abs=1e-6)
                start += height * width


def test_cells(aligned_head):
    raw = [torch.zeros(1, *size, 4 * BINS + CLASSES) for size in SIZES]
    centres, strides = aligned_head.cells(raw)
    want = [((c + 0.5) * stride, (r + 0.5) * stride) for _, stride, r, c in every_cell()]
    assert centres.tolist() == [list(centre) for centre in want]
    assert strides.tolist() == [[stride] for _, stride, _, _ in every_cell()]


def test_the_grid_is_x_then_y():
    assert cell_grid(2, 3, torch.device("cpu")).tolist() == [
        [[0, 0], [1, 0], [2, 0]],
        [[0, 1], [1, 1], [2, 1]],
    ]


def test_shapes(aligned_head, anchor_head):
    shapes = [tuple(level.shape) for level in aligned_head(features())]
    assert shapes == [(2, *size, 4 * BINS + CLASSES) for size in SIZES]
    shapes = [tuple(level.shape) for level in anchor_head(features())]
    assert shapes == [(2, 2, *size, 5 + CLASSES) for size in SIZES]
    distances, logits = aligned_head.split(aligned_head(features()))
    assert distances.shape == (2, CELLS, 4, BINS) and logits.shape == (2, CELLS, CLASSES)


def test_what_the_convolutions_say_is_where_decoding_looks(aligned_head, anchor_head):
    """Each output channel stands at its own place of the raw map."""
    for conv, feature, level in zip(
        anchor_head.convs, features(), anchor_head(features()), strict=True
    ):
        channels = level.permute(0, 1, 4, 2, 3).flatten(1, 2)  # anchor by anchor
        assert torch.equal(channels, conv(feature))
    parts = zip(
        aligned_head.stems, aligned_head.box_convs, aligned_head.cls_convs, features(),
        aligned_head(features()), strict=True,
    )  # fmt: skip
    for stem, box_conv, cls_conv, feature, level in parts:
        x = stem(feature)
        channels = (
            box_conv(aligned_head.box_branch(x)),
            cls_conv(aligned_head.cls_branch(x)),
        )
        assert torch.equal(level.permute(0, 3, 1, 2), torch.cat(channels, dim=1))


def test_the_branches_belong_to_all_levels_and_the_last_convolutions_to_one(aligned_head):
    levels = aligned_head(features())
    for part, reached in (
        ("box_branch", [True, True, True]),
        ("cls_branch", [True, True, True]),
        ("stems.1", [False, True, False]),
        ("box_convs.2", [False, False, True]),
        ("cls_convs.0", [True, False, False]),
    ):
        parameter = next(aligned_head.get_submodule(part).parameters())
        for level, reaches in zip(levels, reached, strict=True):
            (grad,) = torch.autograd.grad(
                level.sum(), parameter, retain_graph=True, allow_unused=True
            )
            assert (grad is not None) == reaches, part


def test_classes_and_boxes_have_branches_of_their_own(aligned_head):
    levels = aligned_head(features())
    for part, channels in (
        ("cls_branch", slice(None, 4 * BINS)),
        ("box_branch", slice(4 * BINS, None)),
    ):
        parameter = next(aligned_head.get_submodule(part).parameters())
        total = sum(level[..., channels].sum() for level in levels)
        (grad,) = torch.autograd.grad(total, parameter, retain_graph=True)
        assert not grad.any(), part


def test_a_fresh_aligned_head_believes_in_little():
    """A score of about 1 % everywhere: the prior of Lin et al., 2017."""
    torch.manual_seed(0)
    head = AlignedHead(CHANNELS, 80, width=64, depth=2, bins=16, strides=STRIDES)
    _, scores = head.decode(head(features()))
    assert scores.mean().item() == pytest.approx(0.01, rel=0.3)


def test_a_fresh_aligned_head_sees_small_boxes():
    """About three strides wide, whatever the picture: the smallest objects overlap some."""
    torch.manual_seed(0)
    head = AlignedHead(CHANNELS, 80, width=64, depth=2, bins=16, strides=STRIDES)
    raw = head(features())
    boxes, _ = head.decode(raw)
    _, strides = head.cells(raw)
    in_strides = (boxes[..., 2:] - boxes[..., :2]) / strides
    assert ((in_strides > 2) & (in_strides < 4)).all()


@pytest.mark.parametrize("logit", [-1e4, -50.0, 50.0, 1e4])
def test_decoding_stays_finite_and_in_reach(aligned_head, anchor_head, logit):
    aligned = [torch.full((1, *size, 4 * BINS + CLASSES), logit) for size in SIZES]
    for level in aligned:
        level[..., BINS - 1 : 4 * BINS : BINS] += 1  # the last bin, a little or a lot
    boxes, scores = aligned_head.decode(aligned)
    centres, strides = aligned_head.cells(aligned)
    reach = (boxes - centres.repeat(1, 2)).abs() / strides
    assert (reach <= BINS - 1 + 1e-4).all() and ((scores >= 0) & (scores <= 1)).all()
    boxes, scores = anchor_head.decode([torch.full((1, 2, *s, 5 + CLASSES), logit) for s in SIZES])
    assert boxes.isfinite().all() and ((scores >= 0) & (scores <= 1)).all()


def test_half_precision_maps_are_decoded_in_full(aligned_head, anchor_head):
    """Eight bits of mantissa are five pixels in a thousand."""
    for head in (aligned_head, anchor_head):
        raw = [level.detach().bfloat16() for level in head(features())]
        halves, wholes = head.decode(raw), head.decode([level.float() for level in raw])
        for half, whole in zip(halves, wholes, strict=True):
            assert half.dtype == torch.float32 and torch.equal(half, whole)
