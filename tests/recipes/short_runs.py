"""Trainings of a few steps, for the tests of what a recipe can switch on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import yaml

from convnext_yolo.recipes.checkpoint import load_checkpoint, published
from convnext_yolo.recipes.tracking import read_metrics

from .conftest import TinyRun
from .forkserver import ForkServer, Job

TRAIN = ("-m", "convnext_yolo.launch", "train", "--config")
LOSSES = ("box", "obj", "cls")
# Nine steps are an epoch of the tiny data set.
FOUR_STEPS = {"schedule": {"epochs": 4 / 9, "warmup_epochs": 0.3}, "checkpoint": {"every_steps": 2}}


def train(server: ForkServer, run: TinyRun, ranks: int, *options: str) -> str:
    """Trains to the end; returns what was printed."""
    return server.run(ranks, *TRAIN, str(run.recipe), *options)


def wait_for_step(run: TinyRun, step: int, job: Job | None = None) -> None:
    """Waits until a step is in the metrics."""
    deadline_s = time.monotonic() + 200
    while max((r["step"] for r in read_metrics(run.folder)), default=0) < step:
        assert time.monotonic() < deadline_s, job.output if job else "no step in time"
        time.sleep(0.01)  # between two looks


def kill_at_step(server: ForkServer, run: TinyRun, step: int) -> None:
    """Trains alone, and is killed once a step is in the metrics."""
    job = server.start(1, *TRAIN, str(run.recipe))
    wait_for_step(run, step, job)
    os.kill(job.processes[0], signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL], job.output


def records(folder: Path) -> list[dict[str, Any]]:
    """What was logged of the training, in the order of steps."""
    found = [record for record in read_metrics(folder) if record["kind"] == "train"]
    assert [record["step"] for record in found] == sorted({r["step"] for r in found})
    assert found
    return found


def losses(folder: Path) -> list[list[float]]:
    """The losses of each step."""
    return [[record[name] for name in LOSSES] for record in records(folder)]


def saved(folder: Path, newest: int = 0) -> Any:
    """A checkpoint of a run: its newest, or the `newest`-th before that."""
    return load_checkpoint(published(folder / "checkpoints")[newest])


def used_recipe(folder: Path) -> dict[str, Any]:
    """The recipe as the run has written it down."""
    recipe: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text())
    return recipe
