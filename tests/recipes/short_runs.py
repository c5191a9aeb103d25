"""Trainings of a few steps, for the tests of what a recipe can switch on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from convnext_yolo.recipes.checkpoint import load_checkpoint, published
from convnext_yolo.recipes.tracking import read_metrics

from .conftest import TinyRun
from .forkserver import ForkServer

LOSSES = ("box", "obj", "cls")
# Nine steps are an epoch of the tiny data set.
FOUR_STEPS = {"schedule": {"epochs": 4 / 9, "warmup_epochs": 0.3}, "checkpoint": {"every_steps": 2}}


def train(server: ForkServer, run: TinyRun, ranks: int, *options: str) -> str:
    """Trains to the end; returns what was printed."""
    words = ("-m", "convnext_yolo.launch", "train", "--config", str(run.recipe))
    return server.run(ranks, *words, *options)


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
