"""The moving average of one process (the sharded ones are in test_train.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from convnext_yolo.model.layers import Conv
from convnext_yolo.recipes.config import EmaSection
from convnext_yolo.recipes.ema import Ema


def test_it_is_the_recurrence_over_weights_and_statistics() -> None:
    model = nn.Sequential(Conv(3, 4), nn.Conv2d(4, 2, 1))
    options = EmaSection(decay=0.9, ramp_steps=3)
    ema = Ema(model, options)
    expected = {name: t.double().clone() for name, t in model.state_dict().items()}
    for step in range(1, 8):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1 if tensor.dtype == torch.int64 else torch.randn_like(tensor))
        ema.update(step)
        decay = 0.9 * (1 - math.exp(-step / 3))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.double()
    average = ema.gather()
    assert average.keys() == model.state_dict().keys()  # a model can load it
    for name, value in average.items():
        assert value.double().numpy() == pytest.approx(expected[name].numpy(), abs=1e-5), name


def test_it_is_restored_and_apart_from_the_model() -> None:
    model = nn.Conv2d(2, 2, 1)
    ema = Ema(model, EmaSection())
    other = Ema(nn.Conv2d(2, 2, 1), EmaSection())
    other.load(ema.gather())
    assert torch.equal(other.gather()["weight"], model.weight)
    with torch.no_grad():
        model.weight.zero_()
    assert ema.gather()["weight"].abs().sum() > 0
