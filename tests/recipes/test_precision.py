"""fp16: the loss scale, which must not show. bf16: a resume, which must not show either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convnext_yolo.recipes import precision
from convnext_yolo.recipes.precision import GROW_AFTER, LARGEST, SMALLEST, LossScale, autocast_fp16

from .conftest import TinyRun
from .forkserver import ForkServer
from .short_runs import FOUR_STEPS, losses, records, saved, train

OVERFLOWING = str(Path(__file__).with_name("ranks_overflowing.py"))


def engine(stage: int = 0) -> Any:
    optimizer = SimpleNamespace(custom_loss_scaler=False, external_loss_scale=1.0)
    return SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: stage)


def told(scale: LossScale) -> float:
    """The scale that the optimizer divides by."""
    return float(scale.engine.optimizer.external_loss_scale)


@settings(deadline=None)
@given(steps=st.lists(st.booleans(), max_size=80), grow_after=st.integers(1, 5))
def test_the_scale_halves_and_doubles(steps: list[bool], grow_after: int) -> None:
    """Against the rule, said once more: count good steps in a row, keep within bounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "GROW_AFTER", grow_after)
        scale = LossScale(engine(), dynamic=True)
        exponent, in_a_row = 16, 0
        for applied in steps:
            was = exponent
            in_a_row = in_a_row + 1 if applied else 0
            if not applied:
                exponent = max(0, exponent - 1)
            elif in_a_row % grow_after == 0:
                exponent = min(24, exponent + 1)
            explained = scale.update(applied)
            assert scale.scale == told(scale) == 2.0**exponent
            assert explained == (exponent < was)
            assert SMALLEST <= scale.scale <= LARGEST


def test_it_doubles_after_many_good_steps_only() -> None:
    scale = LossScale(engine(), dynamic=True)
    for _ in range(GROW_AFTER - 1):
        scale.update(True)
    assert scale.scale == 2**16
    scale.update(True)
    assert scale.scale == 2**17


@settings(deadline=None)
@given(steps=st.lists(st.booleans(), max_size=10))
def test_without_fp16_it_is_one_and_explains_nothing(steps: list[bool]) -> None:
    scale = LossScale(engine(), dynamic=False)
    assert not any(scale.update(applied) for applied in steps)
    assert scale.scale == told(scale) == 1
    assert not scale.engine.optimizer.custom_loss_scaler
    loss = torch.tensor(3.0)
    assert scale.scaled(loss) == loss


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_loss_is_scaled_once(stage: int) -> None:
    """By us at stage 0, by DeepSpeed's optimizer, which is told to, at the others."""
    scale = LossScale(engine(stage), dynamic=True)
    assert scale.engine.optimizer.custom_loss_scaler
    assert scale.scaled(torch.tensor(3.0)) == (3 * 2**16 if stage == 0 else 3)


@settings(deadline=None)
@given(exponent=st.integers(0, 24), good_steps=st.integers(0, GROW_AFTER - 1))
def test_a_resume_brings_it_back(exponent: int, good_steps: int) -> None:
    """At its smallest too: 1 is a scale as any other."""
    before, after = LossScale(engine(), dynamic=True), LossScale(engine(), dynamic=True)
    before.scale, before.good_steps = 2.0**exponent, good_steps
    after.load(before.state())
    assert (after.scale, after.good_steps) == (before.scale, before.good_steps)
    assert told(after) == after.scale


def test_a_resume_in_another_precision_begins_anew() -> None:
    fp32, fp16 = LossScale(engine(), dynamic=False), LossScale(engine(), dynamic=True)
    fp16.update(False)
    fp32.load(fp16.state())
    assert fp32.scale == 1
    fresh = LossScale(engine(), dynamic=True)
    fresh.load(fp32.state())
    assert fresh.scale == told(fresh) == precision.START


def test_autocast_covers_the_module_and_nothing_else() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() < 0:
                raise ValueError("on purpose")
            return linear(x)

    linear, module = nn.Linear(4, 2), Failing()
    autocast_fp16(module, "cpu")
    assert module(torch.ones(1, 4)).dtype == torch.float16
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="on purpose"):
        module(-torch.ones(1, 4))
    assert not torch.is_autocast_enabled("cpu")  # left in spite of the error
    assert linear(torch.ones(1, 4)).dtype == torch.float32


@pytest.fixture(scope="module")
def fp32(fork_server: ForkServer, tiny_run: Callable[..., TinyRun]) -> TinyRun:
    run = tiny_run("fp32", deepspeed={"stage": 1}, **FOUR_STEPS)
    train(fork_server, run, 1)
    return run


@pytest.mark.process
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (0, 2), (1, 1), (1, 2), (3, 1), (3, 2)])
def test_fp16_trains_as_fp32(
    fork_server: ForkServer,
    tiny_run: Callable[..., TinyRun],
    fp32: TinyRun,
    stage: int,
    ranks: int,
) -> None:
    """Losses and gradient norms are those without a scale of 65,536."""
    run = tiny_run(
        f"fp16-{stage}-{ranks}", deepspeed={"stage": stage, "precision": "fp16"}, **FOUR_STEPS
    )
    output = train(fork_server, run, ranks)
    assert "warning" not in output
    for found, want in zip(losses(run.folder), losses(fp32.folder), strict=True):
        assert found == pytest.approx(want, rel=0.05)
    assert losses(run.folder) != losses(fp32.folder)  # it is fp16
    for ours, theirs in zip(records(run.folder), records(fp32.folder), strict=True):
        assert (ours["loss_scale"], theirs["loss_scale"]) == (2**16, 1)
        assert ours["skipped_steps"] == 0
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=0.25)
    tensors = saved(run.folder).tensors
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    assert all(t.dtype != torch.float16 for t in tensors.values())


@pytest.mark.process
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2)])
def test_a_scale_that_is_too_large_comes_down_in_silence(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], stage: int, ranks: int
) -> None:
    """Steps are skipped, and counted, until it fits; a resume goes on with what it came down to."""
    run = tiny_run(
        f"overflowing-{stage}",
        deepspeed={"stage": stage, "precision": "fp16"},
        schedule={"epochs": 7 / 9, "warmup_epochs": 0.3},
        checkpoint={"every_steps": 5},
        optimizer={"skip_limit": 2},  # the scale's own skips do not count
    )
    output = fork_server.run(ranks, OVERFLOWING, "20", str(run.recipe))
    assert "warning" not in output
    logged = records(run.folder)
    scale, skipped = 2**20, 0
    for record in logged:
        if record["gradient_norm"] is None:  # no number
            scale, skipped = scale // 2, skipped + 1
        assert (record["loss_scale"], record["skipped_steps"]) == (scale, skipped)
    assert 2 <= skipped < len(logged) and logged[1]["skipped_steps"] == 2, "else no test"
    held = saved(run.folder, 1)
    before = logged[held.step - 1]
    assert held.state["optimizer_steps"] == held.step - before["skipped_steps"]
    assert held.state["loss_scale"]["scale"] == before["loss_scale"]

    again = run.folder.with_name("again")
    options = ["--run", str(again), "--resume", str(held.path)]
    fork_server.run(ranks, OVERFLOWING, "3", str(run.recipe), *options)
    keys = ("loss_scale", "gradient_norm", "skipped_steps")
    found, want = records(again), logged[held.step :]
    assert [[r[key] for key in keys] for r in found] == [[r[key] for key in keys] for r in want]
    assert losses(again) == losses(run.folder)[held.step :]
    ours, theirs = saved(again).tensors, saved(run.folder).tensors
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


@pytest.mark.process
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_resume_in_bf16_repeats_the_run(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], stage: int
) -> None:
    """To the bit, on two ranks: what small parameters are like in the first step is the point."""
    run = tiny_run(f"bf16-{stage}", deepspeed={"stage": stage, "precision": "bf16"}, **FOUR_STEPS)
    train(fork_server, run, 2)
    whole, wanted = losses(run.folder), saved(run.folder).tensors
    middle = run.folder / "checkpoints/step-00000002"
    output = train(fork_server, run, 2, "--resume", str(middle))
    assert "resuming at step 2 of 4" in output and losses(run.folder) == whole
    found = saved(run.folder).tensors
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]
