"""SIGKILL at any moment: nothing is lost but the steps since the last published checkpoint."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.recipes.checkpoint import load_checkpoint, published
from convnext_yolo.recipes.tracking import read_metrics

from .conftest import STEPS, TinyRun
from .forkserver import ForkServer
from .short_runs import TRAIN, train

pytestmark = pytest.mark.process
WRITES = Path(__file__).with_name("ranks_killed_writing.py")
EVERY = 3  # steps between checkpoints
SECTIONS: dict[str, Any] = {
    "checkpoint": {"every_steps": EVERY, "keep": 1, "keep_best": False},
    "deepspeed": {"stage": 2},
    "evaluation": {"every_epochs": 100},
}


@pytest.fixture(scope="module")
def uninterrupted(fork_server: ForkServer, tiny_run: Callable[..., Any]) -> tuple[str, float]:
    """The weights' hash of a run that nobody kills, and the seconds that it takes."""
    run = tiny_run("peace", **SECTIONS)
    started = time.monotonic()
    train(fork_server, run, 2)
    taken_s = time.monotonic() - started
    return run.sha256(), taken_s


def resume(fork_server: ForkServer, run: TinyRun) -> None:
    """Goes on to the end, from the newest published checkpoint."""
    newest = [path.name for path in published(run.folder / "checkpoints")][:1]
    output = train(fork_server, run, 2)
    found = re.search(rf"(from|resuming at) step (\d+) of {STEPS}", output)
    assert found, output
    assert int(found[2]) == (int(newest[0].removeprefix("step-")) if newest else 0), output
    checkpoints = run.folder / "checkpoints"
    assert not list(checkpoints.glob("*.partial"))
    assert load_checkpoint(published(checkpoints)[0]).step == STEPS


def check_same(run: TinyRun, uninterrupted: tuple[str, float]) -> None:
    assert run.sha256() == uninterrupted[0]
    steps = [r["step"] for r in read_metrics(run.folder) if r["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))  # each once


def kill_at_moments(
    fork_server: ForkServer,
    run: TinyRun,
    moments: random.Random,
    kills: int,
    whole_s: float,
) -> int:
    """Kills a random rank at random moments of as many starts; returns how many hit one alive."""
    hits = 0
    for _ in range(kills):
        job = fork_server.start(2, *TRAIN, str(run.recipe))
        # The one sleep that is meant: the moment of the kill. Whatever it hits must do.
        time.sleep(moments.uniform(0, whole_s))
        with contextlib.suppress(ProcessLookupError):
            os.kill(moments.choice(job.processes), signal.SIGKILL)
        hits += -signal.SIGKILL in job.wait()
    return hits


@pytest.mark.parametrize(
    ("kills", "seed"),
    [
        pytest.param(5, 0, marks=pytest.mark.timeout(900)),
        pytest.param(30, 1, marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
)
def test_random_ranks_at_random_moments(
    fork_server: ForkServer,
    tiny_run: Callable[..., Any],
    uninterrupted: tuple[str, float],
    kills: int,
    seed: int,
) -> None:
    """A run that is killed again and again still ends with the weights of one that never was."""
    moments, hits, runs = random.Random(seed), 0, 0
    while hits < kills:
        # Two kills in the life of each run, one of them while it resumes.
        run = tiny_run(f"killed{seed}-{runs}", **SECTIONS)
        hits += kill_at_moments(fork_server, run, moments, min(2, kills - hits), uninterrupted[1])
        resume(fork_server, run)
        check_same(run, uninterrupted)
        runs += 1


def test_a_run_that_went_back_and_is_killed_goes_on_from_there(
    fork_server: ForkServer, tiny_run: Callable[..., Any], uninterrupted: tuple[str, float]
) -> None:
    """Before it has published anything: what metrics.jsonl has and where it goes on are one."""
    run = tiny_run("back", **{**SECTIONS, "checkpoint": {"every_steps": 6}})
    train(fork_server, run, 2)
    check_same(run, uninterrupted)
    middle = run.folder / "checkpoints/step-00000006"
    job = fork_server.start(2, *TRAIN, str(run.recipe), "--resume", str(middle))
    job.wait_for_line("training ")
    os.kill(job.processes[0], signal.SIGKILL)
    job.wait()
    assert "step-00000012 is not of this run's past" in job.output
    assert "resuming at step 6 of 12" in train(fork_server, run, 2)
    check_same(run, uninterrupted)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.timeout(900)
def test_at_every_point_of_writing_a_checkpoint(
    fork_server: ForkServer,
    tiny_run: Callable[..., Any],
    uninterrupted: tuple[str, float],
    rank: int,
) -> None:
    """Before each call that changes the disk: what was published before is gone on from."""
    peaceful = tiny_run(f"points{rank}", **SECTIONS)
    output = fork_server.run(2, str(WRITES), str(rank), "10000", str(peaceful.recipe))
    found = re.search(r"^points: (\d+)$", output, re.M)
    assert found, output
    points = int(found[1])
    assert points >= (12 if rank == 0 else 4), output
    for point in range(points):
        run = tiny_run(f"point{rank}-{point}", **SECTIONS)
        job = fork_server.start(2, str(WRITES), str(rank), str(point), str(run.recipe))
        assert job.wait()[rank] == -signal.SIGKILL, job.output
        left = [path.name for path in published(run.folder / "checkpoints")]
        assert left in (
            [f"step-{EVERY:08d}"],
            [f"step-{2 * EVERY:08d}", f"step-{EVERY:08d}"],
            [f"step-{2 * EVERY:08d}"],
        ), f"point {point}"
        resume(fork_server, run)
        check_same(run, uninterrupted)
