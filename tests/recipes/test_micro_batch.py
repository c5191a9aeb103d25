"""The search for the largest micro-batch: patched, over ranks, against real memory, in a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.model.detector import Criterion, Detector, build_criterion, build_detector
from convnext_yolo.recipes import micro_batch
from convnext_yolo.recipes.build import architecture
from convnext_yolo.recipes.config import Recipe, RecipeError
from convnext_yolo.recipes.distributed import World
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.micro_batch import find_micro_batch

from .conftest import TinyRun
from .forkserver import ForkServer
from .short_runs import FOUR_STEPS, losses, saved, train, used_recipe

SCRIPT = str(Path(__file__).with_name("ranks_searching.py"))
WORDS = ("--model.backbone.name", "test_convnext", "--data.image_px", "[64, 96]")


MIB = "200"


def recipe(total: int = 8, *words: str) -> Recipe:
    return load_recipe([], ["--batch.global", str(total), "--batch.micro", "1", *WORDS, *words])


@pytest.fixture(scope="module")
def model() -> Detector:
    return build_detector(architecture(recipe(), 3))


@pytest.fixture(scope="module")
def criterion(model: Detector) -> Criterion:
    return build_criterion(model, recipe().model.loss.model_dump())


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


def search(total: int, largest: int, *rest: Any) -> tuple[int, list[int]]:
    """What is found where more than `largest` pictures are too many, and what was tried."""
    tried: list[int] = []

    def attempt(size: int, *_: Any) -> None:
        tried.append(size)
        if size > largest:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batch, "_try", attempt)
        # Collecting garbage after each try would take most of the test's time.
        patch.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: None)
        return find_micro_batch(recipe(total), *rest), tried


@settings(deadline=None, max_examples=60)
@given(total=st.integers(1, 96), largest=st.integers(1, 100))
def test_it_is_the_largest_divisor_that_fits(
    model: Detector, criterion: Criterion, world: World, total: int, largest: int
) -> None:
    found, tried = search(total, largest, model, criterion, world)
    assert found == max(n for n in range(1, min(total, largest) + 1) if total % n == 0)
    assert tried == sorted({n for n in range(found, total + 1) if total % n == 0}, reverse=True)


def test_nothing_fits(model: Detector, criterion: Criterion, world: World) -> None:
    with pytest.raises(RecipeError, match=r"batch\.find_micro: not even one picture fits"):
        search(12, 0, model, criterion, world)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError("std::bad_alloc"),
    ],
)
def test_a_lack_of_memory_by_any_name(
    monkeypatch: pytest.MonkeyPatch,
    model: Detector,
    criterion: Criterion,
    world: World,
    error: Exception,
) -> None:
    def attempt(size: int, *_: Any) -> None:
        if size > 2:
            raise error

    monkeypatch.setattr(micro_batch, "_try", attempt)
    assert find_micro_batch(recipe(8), model, criterion, world) == 2


def test_another_error_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, model: Detector, criterion: Criterion, world: World
) -> None:
    def attempt(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(micro_batch, "_try", attempt)
    with pytest.raises(RuntimeError, match="shapes differ"):
        find_micro_batch(recipe(), model, criterion, world)


def test_a_batch_that_can_not_be_shared_is_refused(model: Detector, criterion: Criterion) -> None:
    three = World(0, 3, 0, torch.device("cpu"))
    with pytest.raises(RecipeError, match=r"batch.global = 8 can't be shared equally by 3"):
        find_micro_batch(recipe(8), model, criterion, three)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trying_leaves_the_model_as_it_is(
    model: Detector, criterion: Criterion, world: World, precision: str
) -> None:
    """And computes what a step does: in the largest frame, backward pass included."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    frames: list[tuple[int, ...]] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (
            frames.append(tuple(inputs[0].shape)) if isinstance(module, Detector) else None
        )
    )
    words = ("--deepspeed.precision", precision, "--augment.multi_scale", "0.5")
    options = ("--deepspeed.activation_checkpointing", "true")
    try:
        assert find_micro_batch(recipe(2, *words, *options), model, criterion, world) == 2
    finally:
        hook.remove()
    assert set(frames) == {(2, 3, 96, 128)}
    after = model.state_dict()
    assert all(after[name].equal(t) for name, t in before.items())
    assert all(p.grad is None for p in model.parameters())
    plain = build_detector(architecture(recipe(), 3)).backbone.trunk
    stages = model.backbone.trunk.stages
    assert [s.grad_checkpointing for s in stages] == [s.grad_checkpointing for s in plain.stages]


def told(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.process
@pytest.mark.parametrize(
    ("limits", "found", "tried"),
    [((3, 100), 2, ([4, 2], [4])), ((100, 1), 1, ([4], [4, 2, 1])), ((100, 0), None, ([4], []))],
)
def test_ranks_agree_on_what_fits_all(
    fork_server: ForkServer,
    tiny_run: Callable[..., TinyRun],
    tmp_path: Path,
    limits: tuple[int, int],
    found: int | None,
    tried: tuple[list[int], list[int]],
) -> None:
    """Ranks with different memory; also where one of them can hold nothing at all."""
    run = tiny_run("searching")
    words = (str(tmp_path), str(run.recipe), "limits", *map(str, limits))
    fork_server.run(2, SCRIPT, *words)
    for rank, answer in enumerate(told(tmp_path, 2)):
        if found is None:
            assert answer["error"].startswith("batch.find_micro: not even one picture fits")
        else:
            assert (answer["found"], answer["tried"]) == (found, tried[rank])


@pytest.mark.process
def test_a_real_lack_of_memory(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], tmp_path: Path
) -> None:
    """A process that may not take the memory that its whole share needs."""
    batch = {"global": 64, "micro": 2}
    data = {"train": "-", "val": "-", "image_px": [224, 224]}
    run = tiny_run("starving", batch=batch, data=data)
    fork_server.run(1, SCRIPT, str(tmp_path), str(run.recipe), "memory", MIB)
    [answer] = told(tmp_path, 1)
    assert 1 <= answer["found"] < 64, answer
    assert answer["tried"] == [n for n in (64, 32, 16, 8, 4, 2, 1) if n >= answer["found"]]


@pytest.mark.process
def test_a_run_fixes_what_it_has_found(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    """In its recipe.yaml, for every resume: one rank alone could hold eight."""
    run = tiny_run("finding", batch={"global": 8, "micro": 2, "find_micro": True}, **FOUR_STEPS)
    output = train(fork_server, run, 2)
    assert "the largest micro-batch that fits is 4" in output
    assert "global batch 8 = micro-batch 4 x 1 x 2" in output
    assert used_recipe(run.folder)["batch"] == {"global": 8, "micro": 4, "find_micro": True}

    again = run.folder.with_name("again")
    options = ["--run", str(again), "--resume", str(saved(run.folder, 1).path)]
    output = train(fork_server, run, 1, *options)
    assert "micro-batch that fits" not in output
    assert "global batch 8 = micro-batch 4 x 2 x 1" in output
    assert re.search(r"resuming at step 2 of 4 ", output)
    assert used_recipe(again)["batch"]["micro"] == 4
    assert saved(again).state["recipe"]["batch"] == used_recipe(run.folder)["batch"]
    for found, want in zip(losses(again), losses(run.folder)[2:], strict=True):
        assert found == pytest.approx(want, abs=1e-4)
