"""Checkpoints that can't be written or read, in real runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from convnext_yolo.recipes.checkpoint import load_checkpoint, published

from .conftest import STEPS, TinyRun
from .forkserver import ForkServer
from .short_runs import TRAIN, train

pytestmark = pytest.mark.process
FULL_DISK = str(Path(__file__).with_name("ranks_full_disk.py"))


def names(run: TinyRun) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in published(run.folder / "checkpoints")]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("asynchronous", {}), ("synchronous", {"asynchronous": False}), ("native", {"native": True})],
)
def test_a_disk_that_is_full_for_a_while(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], kind: str, options: dict[str, bool]
) -> None:
    """The run goes on, the old checkpoint stays, the next one is written."""
    run = tiny_run(f"full-{kind}", checkpoint={"every_steps": 4, "keep": 3, **options})
    output = fork_server.run(2, FULL_DISK, "2", "2", str(run.recipe))
    assert re.search(
        r"^warning: checkpoint of step 8: can't be written to .*; training goes on$", output, re.M
    ), output
    assert names(run) == [STEPS, 4]
    assert not list((run.folder / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_stays_full_ends_the_run_cleanly(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], asynchronous: bool
) -> None:
    """What is trained can't be kept: a sentence, not 0, and the last checkpoint resumes."""
    options = {"every_steps": 4, "keep": 3, "asynchronous": asynchronous}
    run = tiny_run(f"full-for-good-{asynchronous}", checkpoint=options)
    job = fork_server.start(2, FULL_DISK, "2", "99", str(run.recipe))
    codes = job.wait()
    assert 2 in codes and 0 not in codes, job.output
    assert "error: checkpoint of step 12: can't be written to" in job.output
    assert "Traceback" not in job.output
    assert names(run) == [4]
    assert "resuming at step 4 of 12" in train(fork_server, run, 2)


def test_a_disk_that_is_full_from_the_start(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    run = tiny_run("full-at-start")
    run.folder.mkdir()
    (run.folder / "recipe.yaml.partial").symlink_to("/dev/full")
    job = fork_server.start(2, *TRAIN, str(run.recipe))
    assert job.wait()[0] == 1, job.output
    says = rf"error: run: {run.folder} can't be written to \(No space left on device\); make room"
    assert re.search(says, job.output) and "OSError" not in job.output, job.output


@pytest.mark.parametrize("damage", ["a flipped byte", "a truncated part"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], damage: str
) -> None:
    run = tiny_run(damage.replace(" ", "-"))
    train(fork_server, run, 2)
    whole = run.sha256()
    newest, before, _ = published(run.folder / "checkpoints")
    part = newest / "part-00000.safetensors"
    content = bytearray(part.read_bytes())
    if damage == "a flipped byte":
        content[len(content) // 2] ^= 1
    part.write_bytes(content if damage == "a flipped byte" else content[:-100])
    output = train(fork_server, run, 2)
    refused = f"checkpoint {newest}: part-00000.safetensors is damaged (its sha256 differs)"
    assert f"{refused}; trying the one before" in output
    assert f"resuming at step {load_checkpoint(before).step} of {STEPS}" in output
    assert names(run) == [12, 8, 4]
    assert run.sha256() == whole
