"""The training run in real processes: launchers, a kill and a resume, both designs and optimizers.

Stages, ranks, kills at other moments and signals have files of their own. What launchers start is
held against ranks of the fork server.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from convnext_yolo.recipes.checkpoint import load_checkpoint, published

from .forkserver import ForkServer
from .short_runs import FOUR_STEPS, kill_at_step, saved, train

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def whole(fork_server: ForkServer, tiny_run: Callable[..., Any]) -> Any:
    """An uninterrupted run: two ranks, ZeRO-2, no launcher."""
    run = tiny_run("whole")
    train(fork_server, run, 2)
    return run


def resumed_at(output: str) -> int:
    match = re.search(r"resuming at step (\d+) of 12", output)
    assert match, output
    return int(match[1])


def test_killed_and_resumed_equals_uninterrupted(whole: Any, tiny_run: Callable[..., Any]) -> None:
    """SIGKILL to every process of the deepspeed launcher in the middle, then `--resume auto`.

    Both parts, of all steps, are bit-equal to what was never killed.
    """
    killed = tiny_run("killed")
    killed.kill_after("deepspeed", step=6)
    assert resumed_at(killed.run("deepspeed", "--resume", "auto")) in (4, 8)

    assert killed.sha256() == whole.sha256()
    assert killed.losses() == whole.losses()  # each step is in metrics.jsonl once
    ours, theirs = (
        load_checkpoint(published(run.folder / "checkpoints")[0]).tensors for run in (killed, whole)
    )
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[0] for name in ours} == {"model", "ema", "exp_avg", "exp_avg_sq"}
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_ours_trains_the_same_whole_and_partitioned(
    fork_server: ForkServer, tiny_run: Callable[..., Any]
) -> None:
    """The anchor-free detector, one head for all levels: ZeRO-3 on two ranks, and alone."""
    model = {
        "backbone": {"name": "test_convnext", "options": {"drop_path_rate": 0.2}},
        "neck_channels": [16, 24, 40],
        "head_channels": 24,
    }
    options = {"model": model, "optimizer": {"lr": 1e-3, "layer_decay": 0.8}}
    alone = tiny_run("ours-alone", deepspeed={"stage": 0}, **options)
    train(fork_server, alone, 1)
    parted = tiny_run("ours-parted", deepspeed={"stage": 3}, **options)
    train(fork_server, parted, 2)
    for found, want in zip(parted.losses(), alone.losses(), strict=True):
        assert found == pytest.approx(want, rel=1e-4, abs=1e-4)
    mixed = tiny_run("ours-bf16", deepspeed={"stage": 1, "precision": "bf16"}, **options)
    train(fork_server, mixed, 1)
    for found, want in zip(mixed.losses(), alone.losses(), strict=True):
        assert found == pytest.approx(want, rel=0.05, abs=0.05)


def test_sgd_and_layer_decay_resume_too(
    fork_server: ForkServer, tiny_run: Callable[..., Any]
) -> None:
    """The other optimizer, with a group for each depth of the backbone."""
    sections = {
        "optimizer": {"name": "sgd", "lr": 0.001, "weight_decay": 5e-4, "layer_decay": 0.8},
        "deepspeed": {"stage": 1},
        "schedule": {"epochs": 12 / 9, "warmup_epochs": 0.3, "decay": "linear"},
    }
    uninterrupted, killed = tiny_run("sgd", **sections), tiny_run("sgd-killed", **sections)
    train(fork_server, uninterrupted, 1)
    kill_at_step(fork_server, killed, 6)
    assert resumed_at(train(fork_server, killed, 1)) in (4, 8)
    assert killed.sha256() == uninterrupted.sha256()
    checkpoint = load_checkpoint(published(killed.folder / "checkpoints")[0])
    assert {name.split("/")[0] for name in checkpoint.tensors} == {
        "model",
        "ema",
        "momentum_buffer",
    }


def check_same_losses(ours: Any, theirs: Any) -> None:
    for step, (found, want) in enumerate(zip(ours.losses(), theirs.losses(), strict=True)):
        assert found == pytest.approx(want, abs=1e-4), f"step {step + 1}"


@pytest.mark.parametrize(
    "launcher",
    ["torchrun", pytest.param("accelerate", marks=pytest.mark.long)],  # tests/cluster has it
)
def test_launchers_train_the_same(whole: Any, tiny_run: Callable[..., Any], launcher: str) -> None:
    """The same recipe under every launcher."""
    run = tiny_run(launcher)
    assert "global batch 8 = micro-batch 2 x 2 x 2" in run.run(launcher)
    check_same_losses(run, whole)
    assert run.sha256() == whole.sha256()


def test_one_rank_trains_the_same(
    fork_server: ForkServer, whole: Any, tiny_run: Callable[..., Any]
) -> None:
    """With twice the accumulation."""
    run = tiny_run("alone")
    assert "global batch 8 = micro-batch 2 x 4 x 1" in train(fork_server, run, 1)
    check_same_losses(run, whole)


def test_a_course_that_differs_is_a_run_of_its_own_for_trackers(
    fork_server: ForkServer, tiny_run: Callable[..., Any]
) -> None:
    """They would keep the steps that they hold; where all is repeated, that is as it should be."""
    run = tiny_run("branches", **FOUR_STEPS)
    wandb = ("--tracking.wandb", "offline")
    train(fork_server, run, 1, *wandb)

    def again(name: str, *options: str) -> str:
        earlier = str(run.folder / "checkpoints/step-00000002")
        train(fork_server, run, 1, *wandb, "--resume", earlier, *options)
        return str(saved(run.folder.with_name(name)).state["tracker_ids"]["wandb"])

    first = str(saved(run.folder).state["tracker_ids"]["wandb"])
    assert again(run.folder.name) == first
    assert again(run.folder.name, "--optimizer.lr", "0.02") != first
    assert again("elsewhere", "--run", str(run.folder.with_name("elsewhere"))) != first
