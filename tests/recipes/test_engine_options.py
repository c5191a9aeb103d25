"""torch.compile and activation checkpointing in real runs: they change no number that matters."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from .conftest import TinyRun
from .forkserver import ForkServer
from .short_runs import FOUR_STEPS, losses, saved, train

pytestmark = pytest.mark.process


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_computes_the_same(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], stage: int
) -> None:
    """On two ranks, with stochastic depth, whose second draw must be the first's."""
    runs = []
    for on in (False, True):
        options = {"stage": stage, "activation_checkpointing": on}
        runs.append(tiny_run(f"checkpointing-{stage}-{on}", deepspeed=options, **FOUR_STEPS))
        train(fork_server, runs[-1], 2)
    plain, checkpointed = runs
    for found, want in zip(losses(checkpointed.folder), losses(plain.folder), strict=True):
        assert found == pytest.approx(want, abs=1e-5)
    ours, theirs = saved(checkpointed.folder).tensors, saved(plain.folder).tensors
    statistics = [name for name in ours if "running_" in name and name.startswith("model/")]
    assert statistics
    for name in statistics:
        assert ours[name].numpy() == pytest.approx(theirs[name].numpy(), abs=1e-5), name


@pytest.mark.timeout(600)
@pytest.mark.long
def test_a_compiled_model_trains_the_same(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    """Without stochastic depth: compiled code draws its own random numbers."""
    model = {
        "name": "seed_convnext_yolo",
        "backbone": {"name": "test_convnext"},
        "adapter_channels": [16, 24, 32],
        "neck_channels": [16, 24, 32],
    }
    runs = []
    for on in (False, True):
        options = {"stage": 1, "compile": on}
        runs.append(tiny_run(f"compiled-{on}", model=model, deepspeed=options, **FOUR_STEPS))
        train(fork_server, runs[-1], 1)
    eager, compiled = (losses(run.folder) for run in runs)
    for found, want in zip(compiled, eager, strict=True):
        assert found == pytest.approx(want, abs=1e-3)
    assert compiled != eager  # to the last digit: it was compiled


def test_options_that_deepspeed_refuses_are_the_recipes_mistake(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    """One sentence instead of pydantic's traceback."""
    options = {"zero_optimization": {"overlap_com": True}}
    run = tiny_run("refused", deepspeed={"options": options}, **FOUR_STEPS)
    job = fork_server.start(2, "-m", "convnext_yolo.launch", "train", "--config", str(run.recipe))
    assert 2 in job.wait(), job.output
    assert "error: deepspeed.options: DeepSpeed refuses them: 1 validation error" in job.output
    assert "overlap_com Extra inputs are not permitted" in job.output
    assert "Traceback" not in job.output and not run.folder.exists()


def test_an_option_that_deepspeed_does_not_know_is_told(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    """It would pass over it without a word; those that it knows it takes."""
    options = {"prescale_gradient": True, "wall_clock_breakdown": False}
    run = tiny_run("unknown", deepspeed={"options": options}, **FOUR_STEPS)
    job = fork_server.start(2, "-m", "convnext_yolo.launch", "train", "--config", str(run.recipe))
    assert job.wait() == [0, 0], job.output
    told = re.findall(r"^warning: (.*)$", job.output, re.M)
    assert told == ["deepspeed.options.prescale_gradient: DeepSpeed does not know it"], job.output


def test_offloaded_moments_are_saved_and_resumed(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    """The overlay as it comes: the same numbers as without it, on the way to another stage too."""
    plain, away = (tiny_run(f"offload-{on}", **FOUR_STEPS) for on in (False, True))
    train(fork_server, plain, 2)
    train(fork_server, away, 2, "--config", "offload")
    whole = [pytest.approx(step, abs=1e-5) for step in losses(plain.folder)]
    assert losses(away.folder) == whole
    middle = ("--resume", str(away.folder / "checkpoints/step-00000002"))
    for more in (("--config", "offload"), ("--deepspeed.stage", "3")):
        train(fork_server, away, 2, *middle, *more)
        assert losses(away.folder) == whole
        assert saved(away.folder).tensors.keys() == saved(plain.folder).tensors.keys()
