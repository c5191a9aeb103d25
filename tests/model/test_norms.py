import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.layers import C3, Bottleneck, Conv
from convnext_yolo.model.norms import MicroBatchNorm2d, micro_batch_norms

CHANNELS = 6


def norms() -> tuple[MicroBatchNorm2d, nn.BatchNorm2d]:
    """Ours and torch's with equal weights and running statistics, both away from the start."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.03)
    with torch.no_grad():
        for tensor in (theirs.weight, theirs.bias, theirs.running_mean):
            tensor.normal_()
        theirs.running_var.uniform_(0.5, 2)
    ours = MicroBatchNorm2d(CHANNELS)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def micro_batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, CHANNELS, 5, 4, generator=generator) * (i + 1) for i in range(count)]


def commit(norm: MicroBatchNorm2d) -> None:
    norm.move_running(*norm.take_pending())


def test_training_gives_what_batchnorm_gives():
    ours, theirs = norms()
    (x,) = micro_batches(1)
    ours_in, theirs_in = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, reference = ours(ours_in), theirs(theirs_in)
    assert torch.equal(y, reference)
    y.square().sum().backward()
    reference.square().sum().backward()
    assert torch.equal(ours_in.grad, theirs_in.grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(ours.bias.grad, theirs.bias.grad)


def test_one_micro_batch_moves_the_statistics_as_batchnorm_does():
    ours, theirs = norms()
    (x,) = micro_batches(1)
    ours(x), theirs(x)
    commit(ours)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 1


def test_a_global_step_moves_the_statistics_by_the_mean_of_its_micro_batches():
    ours, _ = norms()
    before = copy.deepcopy(ours.state_dict())
    batches = micro_batches(4)
    for x in batches:
        ours(x)
    after = ours.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # until the commit
    commit(ours)
    mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    var = torch.stack([x.var((0, 2, 3), unbiased=True) for x in batches]).mean(0)
    torch.testing.assert_close(ours.running_mean, 0.97 * before["running_mean"] + 0.03 * mean)
    torch.testing.assert_close(ours.running_var, 0.97 * before["running_var"] + 0.03 * var)
    assert ours.num_batches_tracked == 1


def test_ranks_add_up_to_one_process():
    alone, _ = norms()
    ranks = [norms()[0], norms()[0]]
    batches = micro_batches(4)
    for x in batches:
        alone(x)
    for rank, norm in enumerate(ranks):
        for x in batches[rank::2]:
            norm(x)
    pending = sum(norm.take_pending() for norm in ranks) / 2  # what the all-reduce gives
    for norm in ranks:
        norm.move_running(*pending)
    commit(alone)
    torch.testing.assert_close(ranks[0].running_mean, alone.running_mean)
    torch.testing.assert_close(ranks[0].running_var, alone.running_var)


def test_taking_forgets():
    ours, _ = norms()
    ours(micro_batches(1)[0])
    assert ours.take_pending().any()
    assert not ours.take_pending().any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_micro_batch_counts_once(use_reentrant):
    """Its forward pass runs a second time in the backward pass."""
    plain, _ = norms()
    other = copy.deepcopy(plain)
    after = nn.Conv2d(CHANNELS, 1, 1)  # what the recomputation is for
    (x,) = micro_batches(1)
    x.requires_grad_()
    after(plain(x)).sum().backward()
    block = nn.Sequential(other, after)
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert other.pending_count == 2
    torch.testing.assert_close(other.take_pending(), plain.take_pending())


def test_evaluation_is_batchnorms_and_leaves_no_trace():
    ours, theirs = norms()
    ours.eval(), theirs.eval()
    (x,) = micro_batches(1)
    assert torch.equal(ours(x), theirs(x))
    assert not ours.take_pending().any()


def test_a_checkpoint_looks_like_batchnorms():
    ours, theirs = norms()
    ours(micro_batches(1)[0])
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_every_norm_of_neck_is_counted(architecture):
    with torch.device("meta"):
        detector = build_detector(architecture)
    counted = micro_batch_norms(detector)
    assert len(counted) == sum(isinstance(m, nn.BatchNorm2d) for m in detector.modules()) > 20


@pytest.mark.parametrize(("kernel", "stride", "size"), [(1, 1, 8), (3, 1, 8), (3, 2, 4)])
def test_convolution(kernel, stride, size):
    torch.manual_seed(0)
    conv = Conv(4, 6, kernel, stride)
    x = torch.randn(2, 4, 8, 8)
    y = conv(x)
    assert y.shape == (2, 6, size, size)
    assert conv.conv.bias is None
    plain = nn.functional.batch_norm(conv.conv(x), None, None, training=True, eps=1e-3)
    torch.testing.assert_close(y, plain * plain.sigmoid())


def test_the_shortcut_adds_the_input():
    torch.manual_seed(0)
    block = Bottleneck(4, shortcut=True).eval()
    x = torch.randn(1, 4, 8, 8)
    with_it = block(x)
    block.shortcut = False
    torch.testing.assert_close(with_it, block(x) + x)


@pytest.mark.parametrize("repeats", [1, 3])
def test_cross_stage_partial_block(repeats):
    block = C3(6, 10, repeats, partial(Bottleneck, shortcut=False))
    assert block(torch.randn(2, 6, 4, 5)).shape == (2, 10, 4, 5)
    assert len(block.blocks) == repeats
