"""Batch arithmetic and DeepSpeed's configuration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convnext_yolo.data_prep.stream import BatchPlan
from convnext_yolo.recipes.config import Recipe, RecipeError
from convnext_yolo.recipes.distributed import World
from convnext_yolo.recipes.engine import BUCKET, batch_plan, deepspeed_config
from convnext_yolo.recipes.load import load_recipe


def world(size: int, rank: int = 0) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def recipe(*words: str) -> Recipe:
    return load_recipe([], words)


@given(micro=st.integers(1, 8), accumulation=st.integers(1, 4), size=st.integers(1, 8))
def test_ranks_share_every_lane_once(micro: int, accumulation: int, size: int) -> None:
    total = micro * accumulation * size
    options = recipe("--batch.global", str(total), "--batch.micro", str(micro))
    lanes = []
    for rank in range(size):
        plan = batch_plan(options, world(size, rank))
        assert plan.accumulation == accumulation
        lanes += [list(plan.lanes(turn)) for turn in range(accumulation)]
    # The same micro-batches of the same lanes as one process makes, whoever makes them.
    alone = batch_plan(options, world(1))
    whole = [list(alone.lanes(turn)) for turn in range(alone.accumulation)]
    assert sorted(lanes) == whole
    assert sorted(lane for part in lanes for lane in part) == list(range(total))


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(RecipeError, match=r"batch.*: global 10 is not a multiple of micro 4"):
        batch_plan(recipe("--batch.global", "10", "--batch.micro", "4"), world(1))
    with pytest.raises(RecipeError, match=r"3 processes can't share .* 1 or 2 or 4 processes"):
        batch_plan(recipe("--batch.global", "16", "--batch.micro", "4"), world(3))


def test_configuration_follows_from_the_recipe() -> None:
    options = recipe("--deepspeed.stage", "3", "--optimizer.clip", "2")
    config = deepspeed_config(options, BatchPlan(64, 16, 0, 2))
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 16
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 2
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": BUCKET}
    assert "torch_autocast" not in config
    bf16 = deepspeed_config(recipe("--deepspeed.precision", "bf16"), BatchPlan(64, 16, 0, 1))
    assert bf16["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    whole = deepspeed_config(
        recipe("--deepspeed.precision", "bf16", "--deepspeed.stage", "3"), BatchPlan(64, 16, 0, 1)
    )
    assert whole["torch_autocast"]["lower_precision_safe_modules"] == []


def test_own_keys_are_added_and_contradictions_refused() -> None:
    plan = BatchPlan(64, 16, 0, 1)
    words = (
        "--deepspeed.options",
        "{zero_optimization: {reduce_bucket_size: 9}, dump_state: true}",
    )
    config = deepspeed_config(recipe(*words), plan)
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 9}
    assert config["dump_state"] is True
    bad = recipe("--deepspeed.options", "{zero_optimization: {stage: 2}}")
    with pytest.raises(RecipeError, match=r"options.zero_optimization.stage = 2 contradicts 1"):
        deepspeed_config(bad, plan)
