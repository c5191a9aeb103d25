import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torchvision.ops import complete_box_iou_loss

from convnext_yolo.model.boxes import complete_iou, cxcywh_to_xyxy, xyxy_to_cxcywh


def random_boxes(seed: int, count: int, smallest: float = 0.1) -> torch.Tensor:
    """cxcywh, `[count, 4]`."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=generator) * 20
    boxes[:, 2:] += smallest
    return boxes


def test_corners_and_centres():
    corners, centres = torch.tensor([[1.0, 2, 5, 10]]), torch.tensor([[3.0, 6, 4, 8]])
    assert torch.equal(xyxy_to_cxcywh(corners), centres)
    assert torch.equal(cxcywh_to_xyxy(centres), corners)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4)])
def test_the_round_trip_of_any_shape(shape):
    boxes = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    there_and_back = cxcywh_to_xyxy(xyxy_to_cxcywh(boxes))
    assert there_and_back.shape == shape
    torch.testing.assert_close(there_and_back, boxes)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_complete_iou_and_its_gradient_are_torchvisions(seed):
    first, second = random_boxes(seed, 20), random_boxes(seed + 1, 20)
    ours, theirs = first.clone().requires_grad_(), first.clone().requires_grad_()
    loss = 1 - complete_iou(ours, second)
    reference = complete_box_iou_loss(cxcywh_to_xyxy(theirs), cxcywh_to_xyxy(second))
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    reference.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), move=st.floats(-5, 5), scale=st.floats(0.5, 2))
def test_complete_iou_knows_no_place_and_no_unit(seed, move, scale):
    first, second = random_boxes(seed, 20), random_boxes(seed + 1, 20)
    shift = torch.tensor([move, move, 0, 0])
    iou = complete_iou(first, second)
    torch.testing.assert_close(
        complete_iou((first + shift) * scale, (second + shift) * scale), iou, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(complete_iou(second, first), iou, rtol=0, atol=1e-5)
    assert ((iou > -1.5) & (iou <= 1)).all()


def test_complete_iou_of_the_same_box_is_one():
    boxes = random_boxes(0, 20)
    torch.testing.assert_close(complete_iou(boxes, boxes), torch.ones(20))


def test_complete_iou_falls_with_distance_where_nothing_overlaps():
    still = torch.tensor([[0.0, 0, 2, 2]]).expand(4, 4)
    apart = torch.tensor([[3.0, 0, 2, 2], [5, 0, 2, 2], [9, 0, 2, 2], [99, 0, 2, 2]])
    iou = complete_iou(apart, still)
    assert (iou.diff() < 0).all() and (iou < 0).all()


def test_complete_iou_punishes_another_shape():
    square = torch.tensor([[0.0, 0, 4, 4]])
    # Both cover the half of it, about its centre.
    alike = complete_iou(torch.tensor([[0.0, 0, 8**0.5, 8**0.5]]), square)
    flat = complete_iou(torch.tensor([[0.0, 0, 4, 2]]), square)
    assert flat < alike


@pytest.mark.parametrize("side", [0.0, 1e-30, 1e-7, 1e7])
def test_gradients_stay_finite_for_any_size(side):
    boxes = torch.tensor([[0.5, 0.5, side, side], [0, 0, side, 1], [0, 0, 1, side]])
    boxes.requires_grad_()
    iou = complete_iou(boxes, torch.tensor([[0.5, 0.5, 3.0, 2.0]]).expand(3, 4))
    iou.sum().backward()
    assert iou.isfinite().all() and boxes.grad.isfinite().all()
