"""What may change between a checkpoint and the recipe that resumes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.recipes.checkpoint import (
    FORMAT,
    Checkpoint,
    CheckpointError,
    manifest_sha256,
)
from convnext_yolo.recipes.config import Recipe
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.resume import check_data, is_finished, recipe_changes


def written_under(recipe: Recipe, **state: Any) -> Checkpoint:
    recorded = recipe.model_dump(mode="json", by_alias=True)
    return Checkpoint(Path("runs/x/step-00000004"), 4, {"recipe": recorded, **state}, {})


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], []),
        (["--deepspeed.stage", "3"], ["deepspeed.stage 1 → 3"]),
        (
            ["--schedule.epochs", "60", "--data.workers", "0"],
            ["data.workers 4 → 0", "schedule.epochs 50.0 → 60.0"],
        ),
    ],
)
def test_what_may_change_is_told(words: list[str], changes: list[str]) -> None:
    told = recipe_changes(load_recipe([], words), written_under(Recipe()))
    assert len(told) == len(changes)
    for change in changes:
        assert any(change in line for line in told), told


@pytest.mark.parametrize(
    "words",
    [
        ["--model.weights", "/gone.safetensors"],
        ["--model.backbone.weights", "/gone.safetensors"],
        ["--model.backbone.pretrained", "true"],
        ["--model.loss.cls", "1"],
    ],
)
def test_what_the_model_began_with_may_change(words: list[str]) -> None:
    """A resume takes the checkpoint's weights, also where the first ones are gone."""
    [told] = recipe_changes(load_recipe([], words), written_under(Recipe()))
    assert words[0][2:] in told


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", "1"],
        ["--batch.global", "32"],
        ["--batch.micro", "8"],
        ["--model.neck_repeats", "2"],
        ["--model.backbone.options.depths", "[1]"],
        ["--optimizer.name", "sgd"],
    ],
)
def test_what_may_not_is_refused(words: list[str]) -> None:
    with pytest.raises(CheckpointError, match=words[0][2:]):
        recipe_changes(load_recipe([], words), written_under(Recipe()))


def test_other_shards_are_refused() -> None:
    checkpoint = written_under(Recipe(), data_fingerprint="a")
    check_data(checkpoint, "a", "shards/train")
    with pytest.raises(CheckpointError, match="other training shards than shards/train"):
        check_data(checkpoint, "b", "shards/train")


def test_a_run_that_is_not_there_is_not_finished(tmp_path: Path) -> None:
    recipe = load_recipe([], ["--run", str(tmp_path)])
    assert not is_finished(recipe)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert not is_finished(recipe)


@pytest.mark.parametrize(
    ("words", "evaluated", "finished"),
    [
        ([], 8, True),
        ([], 4, False),  # its last evaluation was broken off
        (["--tracking.log_every", "5"], 8, True),  # or a job would requeue itself for ever
        (["--batch.find_micro", "true"], 8, True),  # what was found is in the checkpoint alone
        (["--schedule.epochs", "2.5"], 8, False),
        (["--schedule.epochs", "1.5"], 4, True),  # past its end
    ],
)
def test_a_run_is_finished_when_train_has_nothing_to_do(
    tmp_path: Path, words: list[str], evaluated: int, finished: bool
) -> None:
    short = ["--run", str(tmp_path), "--schedule.epochs", "2", *words]
    state = {"steps_per_epoch": 4, "evaluated_step": evaluated}
    manifest = {"format": FORMAT, "step": 8, "state": state, "parts": {}}
    manifest["sha256"] = manifest_sha256(manifest)
    path = tmp_path / "checkpoints" / "step-00000008" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest))
    assert is_finished(load_recipe([], short)) is finished
