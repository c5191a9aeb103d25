"""NaN and Inf in real runs: named, skipped on all ranks, counted, and fatal when they stay."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from convnext_yolo.recipes.checkpoint import load_checkpoint, published
from convnext_yolo.recipes.tracking import read_metrics

from .conftest import STEPS, TinyRun
from .forkserver import ForkServer

pytestmark = pytest.mark.process
SCRIPT = str(Path(__file__).with_name("ranks_with_nan.py"))
MODULE = "backbone.trunk.stages.1.blocks.0.mlp.fc1"


def run_with_nan(
    server: ForkServer, run: TinyRun, where: str, steps: str, *options: str
) -> tuple[list[int], str]:
    job = server.start(2, SCRIPT, where, steps, "1", str(run.recipe), *options)
    return job.wait(), job.output


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_module_and_the_pictures_are_named_and_the_step_skipped(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], stage: int
) -> None:
    """NaN on one rank: no rank takes the step, and all else goes on."""
    run = tiny_run(f"nan{stage}", deepspeed={"stage": stage})
    codes, output = run_with_nan(fork_server, run, MODULE, "3,7")
    assert codes == [0, 0], output
    told = re.findall(r"^warning: step (\d+) is skipped: (.*)$", output, re.M)
    assert [step for step, _ in told] == ["3", "7"], output
    for _, text in told:
        assert text.startswith(f"NaN or Inf, first in the output of {MODULE}, on rank 1"), text
        ids = re.search(r"of the images ([\d, ]+)", text)
        assert ids and len(ids[1].split(", ")) == 2, text  # the micro-batch's
    records = {r["step"]: r for r in read_metrics(run.folder) if r["kind"] == "train"}
    assert [records[s]["skipped_steps"] for s in (2, 3, 6, 7, STEPS)] == [0, 1, 1, 2, 2]
    assert records[3]["box"] is None and records[4]["box"] is not None
    tensors = load_checkpoint(published(run.folder / "checkpoints")[0]).tensors
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_a_gradient_is_named_too(fork_server: ForkServer, tiny_run: Callable[..., TinyRun]) -> None:
    run = tiny_run("nan-gradient")
    codes, output = run_with_nan(fork_server, run, f"gradient:{MODULE}", "2")
    assert codes == [0, 0], output
    assert (
        f"step 2 is skipped: NaN or Inf, first in the backward pass of {MODULE}, on rank 1"
        in output
    )
    assert read_metrics(run.folder)[1]["box"] is not None


def test_a_skipped_step_counts_in_a_resume(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    run = tiny_run("nan-resumed")
    run_with_nan(fork_server, run, MODULE, "2", "--schedule.epochs", "0.67")
    assert load_checkpoint(published(run.folder / "checkpoints")[0]).state["optimizer_steps"] == 5
    fork_server.run(2, "-m", "convnext_yolo.launch", "train", "--config", str(run.recipe))
    assert read_metrics(run.folder)[-2]["skipped_steps"] == 1


def test_too_many_in_a_row_end_the_run(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    run = tiny_run("nan-for-ever", optimizer={"skip_limit": 3})
    codes, output = run_with_nan(fork_server, run, MODULE, "5,6,7,8,9")
    assert codes in ([1, 1], [1, -9], [-9, 1]), output  # the launcher kills the others
    assert re.search(r"error: step 7: 3 steps in a row gave gradients that are no numbers", output)
    assert "Traceback" not in output
    assert published(run.folder / "checkpoints")[0].name == "step-00000004"
