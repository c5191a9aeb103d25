"""NaN and Inf in real runs: named, skipped on all ranks, counted, and fatal when they stay."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from convnext_yolo.model.assign import Targets
from convnext_yolo.model.losses import AnchorCriterion
from convnext_yolo.recipes.checkpoint import load_checkpoint, published
from convnext_yolo.recipes.guard import NO_MEMORY, Guard, MicroBatch, _Watch
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


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_a_gradient_is_named_too(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], again: bool
) -> None:
    run = tiny_run(f"nan-gradient-{again}", deepspeed={"activation_checkpointing": again})
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


def test_the_last_one_that_is_allowed_is_named(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    run = tiny_run("nan-once", optimizer={"skip_limit": 1})
    _, output = run_with_nan(fork_server, run, MODULE, "2")
    assert re.search(rf"error: step 2: 1 steps in a row .*first in the output of {MODULE}", output)


def test_a_search_that_lacks_memory_is_no_failure() -> None:
    """The step itself had enough, but the other ranks wait for what is found here."""

    class Full(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = SimpleNamespace(module=Full(), zero_optimization_stage=lambda: 1)
    guard = Guard(engine, AnchorCriterion(1.0, 1.0, 1.0), "fp32", 1)
    nothing = Targets(torch.zeros(0), torch.zeros(0), torch.zeros(0, 4))
    batch = MicroBatch(torch.zeros(1, 3, 8, 8), nothing, (1,), 0)
    assert guard._find(batch) == NO_MEMORY


def test_a_search_keeps_one_output_only() -> None:
    """All of them would need more memory than the step, whose activations may not be kept."""
    kept: list[weakref.ref[Tensor]] = []
    watch = _Watch()
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    for name, layer in layers.named_children():
        layer.register_forward_hook(watch.hook(name))
        layer.register_forward_hook(lambda m, i, output: kept.append(weakref.ref(output)))
    with torch.no_grad():
        layers(torch.zeros(1, 4))
    assert not any(ref() is not None for ref in kept)
