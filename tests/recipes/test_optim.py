"""Parameter groups and the learning rate of each step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from convnext_yolo.model.detector import Detector, build_detector
from convnext_yolo.recipes.build import architecture
from convnext_yolo.recipes.config import OptimizerSection, Recipe, ScheduleSection
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.optim import (
    build_optimizer,
    lr_factor,
    moment_names,
    parameter_groups,
    set_hyperparameters,
    total_steps,
    warmup_share,
)


@pytest.fixture(scope="module")
def model() -> Detector:
    recipe: Recipe = load_recipe([], ["--model.backbone.name", "test_convnext"])
    return build_detector(architecture(recipe, 3))


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(
    model: Detector, layer_decay: float
) -> None:
    groups = parameter_groups(model, OptimizerSection(layer_decay=layer_decay, weight_decay=0.1))
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert group["weight_decay"] in (0.0, 0.1)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_layer_decay_reaches_the_optimizer(model: Detector) -> None:
    options = OptimizerSection(layer_decay=0.7, lr=1.0)
    optimizer = build_optimizer(model, options, 1)
    set_hyperparameters(optimizer, 0.5, 1.0, options)
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    stem = lr[id(model.backbone.trunk.stem[0].weight)]
    last = lr[id(next(model.backbone.trunk.stages[3].blocks[0].parameters()))]
    head = lr[id(model.head.cls_convs[0].weight)]
    assert stem < 0.7 * last <= 0.5 and head == 0.5


def test_the_optimizers(model: Detector) -> None:
    adamw = build_optimizer(model, OptimizerSection(betas=(0.8, 0.9)), 0)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["betas"] == (0.8, 0.9)
    sgd = build_optimizer(model, OptimizerSection(name="sgd", momentum=0.5), 0)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["nesterov"] and sgd.defaults["momentum"] == 0.5
    assert moment_names("adamw") == ("exp_avg", "exp_avg_sq")
    assert moment_names("sgd") == ("momentum_buffer",)


def test_sgd_warms_up_as_yolov5(model: Detector) -> None:
    options = OptimizerSection(name="sgd", momentum=0.937, warmup_momentum=0.8, warmup_bias_lr=0.1)
    schedule = ScheduleSection(epochs=10, warmup_epochs=2)
    optimizer = build_optimizer(model, options, 1)
    bias, norm = model.head.cls_convs[0].bias, model.neck.lateral5.norm.weight
    seen = []
    for step in (0, 9, 20, 50):
        share = warmup_share(step, 10, schedule)
        set_hyperparameters(optimizer, 0.01 * share, share, options)
        group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        assert group[id(norm)]["lr"] == pytest.approx(0.01 * share)
        seen.append((share, group[id(bias)]["lr"], group[id(bias)]["momentum"]))
    assert seen[0] == pytest.approx((1 / 21, 0.01 / 21 + 0.1 * 20 / 21, 0.8 + 0.137 / 21))
    assert seen[1][1] == pytest.approx(0.1 - 0.09 * 10 / 21)
    assert seen[2] == pytest.approx((1, 0.01, 0.937)) and seen[3] == seen[2]


@pytest.mark.parametrize("decay", ["linear", "cosine", "flat_cosine"])
def test_schedule_warms_up_and_decays(decay: str) -> None:
    options = ScheduleSection(epochs=10, warmup_epochs=2, decay=decay, final=0.05)  # type: ignore[arg-type]
    factors = [lr_factor(step, 10, options) for step in range(total_steps(10, options))]
    assert len(factors) == 100
    peak = 0.81 if decay == "linear" else 1  # YOLOv5's line begins with the run
    assert factors[0] == pytest.approx(1 / 21) and factors[20] == pytest.approx(peak)
    assert all(a < b for a, b in pairwise(factors[:21]))
    assert all(a >= b for a, b in pairwise(factors[20:]))
    assert 0.05 <= factors[-1] < 0.07
    middle = factors[59]  # almost half of the way down
    assert {"linear": middle < 0.55, "cosine": middle < 0.55, "flat_cosine": middle == 1}[decay]


def test_short_runs_have_at_least_a_step() -> None:
    options = ScheduleSection(epochs=0.01, warmup_epochs=3)
    assert total_steps(10, options) == 1
    assert lr_factor(0, 10, options) > 0
