"""The optimizers of stage 0 against torch's own, clipped by torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convnext_yolo.recipes.stage0 import CheckedAdamW, CheckedSGD

SHAPES = ((3, 4), (5,), (2, 1, 2, 2), ())
KINDS = ("adamw", "sgd")


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def pair(kind: str) -> tuple[Any, Any, list[nn.Parameter], list[nn.Parameter]]:
    """Ours and torch's, each with two groups over parameters of its own, which are equal."""
    mine = parameters()
    reference = copy.deepcopy(mine)
    ours, theirs = {
        "adamw": (CheckedAdamW, torch.optim.AdamW),
        "sgd": (CheckedSGD, torch.optim.SGD),
    }[kind]
    options = {"momentum": 0.9, "nesterov": True} if kind == "sgd" else {"betas": (0.8, 0.9)}

    def groups(tensors: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": tensors[:2], "weight_decay": 0.1},
            {"params": tensors[2:], "weight_decay": 0.0, "lr": 0.3},
        ]

    return (
        ours(groups(mine), lr=0.1, **options),
        theirs(groups(reference), lr=0.1, **options),
        mine,
        reference,
    )


def gradients(seed: int, size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * size for shape in SHAPES]


def give(tensors: list[nn.Parameter], grads: list[Tensor], times: float = 1.0) -> None:
    for tensor, grad in zip(tensors, grads, strict=True):
        tensor.grad = grad * times


def snapshot(optimizer: Any, tensors: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the weights and of whatever the optimizer keeps of each."""
    kept = [
        value
        for tensor in tensors
        for value in optimizer.state[tensor].values()
        if isinstance(value, Tensor)
    ]
    return [t.detach().clone() for t in (*tensors, *kept)]


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4),
    size=st.floats(1e-4, 1e4),
    clip=st.one_of(st.just(0.0), st.floats(1e-3, 1e3)),
    exponent=st.integers(0, 24),
)
def test_a_step_is_torchs_with_its_gradients_unscaled_and_clipped(
    kind: str, seeds: list[int], size: float, clip: float, exponent: int
) -> None:
    ours, theirs, mine, reference = pair(kind)
    ours.clip, ours.external_loss_scale = clip, 2.0**exponent
    for seed in seeds:
        grads = gradients(seed, size)
        give(mine, grads, 2.0**exponent)
        give(reference, grads)
        norm = torch.nn.utils.clip_grad_norm_(reference, clip or float("inf"))
        ours.step()
        theirs.step()
        assert not ours.overflow
        torch.testing.assert_close(ours._global_grad_norm, norm, rtol=1e-5, atol=0)
        for a, b in zip(snapshot(ours, mine), snapshot(theirs, reference), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    value=st.sampled_from((float("nan"), float("inf"), -float("inf"))),
    place=st.integers(0, len(SHAPES) - 1),
    stepped=st.booleans(),
    clip=st.sampled_from((0.0, 1.0)),
)
def test_no_number_no_step(kind: str, value: float, place: int, stepped: bool, clip: float) -> None:
    """Weights, moments and the count of steps stay bit by bit; the next good step is taken."""
    ours, theirs, mine, reference = pair(kind)
    ours.clip = clip
    if stepped:
        for optimizer, tensors in ((ours, mine), (theirs, reference)):
            give(tensors, gradients(1, 0.01))
            optimizer.step()
    before = snapshot(ours, mine)
    spoilt = gradients(2, 0.01)
    spoilt[place].view(-1)[0] = value
    give(mine, spoilt)
    ours.step()
    assert ours.overflow and not ours._global_grad_norm.isfinite()
    after = snapshot(ours, mine)
    assert len(after) == len(before)
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))

    for optimizer, tensors in ((ours, mine), (theirs, reference)):
        give(tensors, gradients(3, 0.01))
        optimizer.step()
    assert not ours.overflow
    for a, b in zip(snapshot(ours, mine), snapshot(theirs, reference), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_makes_gradients_overflow_is_told(kind: str) -> None:
    """Each gradient is a number, their norm is none: that is too large a scale as well."""
    ours, _, mine, _ = pair(kind)
    before = snapshot(ours, mine)
    give(mine, [torch.full(shape, 3e38) for shape in SHAPES])
    ours.step()
    assert ours.overflow
    assert all(a.equal(b) for a, b in zip(snapshot(ours, mine), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_a_gradient_stay(kind: str) -> None:
    ours, _, mine, _ = pair(kind)
    before = [p.detach().clone() for p in mine]
    ours.clip = 1.0
    mine[1].grad = torch.ones(5)
    ours.step()
    assert ours._global_grad_norm == pytest.approx(5**0.5)
    same = [p.equal(b) for p, b in zip(mine, before, strict=True)]
    assert same == [True, False, True, True]
