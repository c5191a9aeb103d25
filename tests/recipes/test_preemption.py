"""Being asked to stop: one more step, a published checkpoint, the exit code, nobody left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convnext_yolo.recipes.checkpoint import load_checkpoint, published
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.preemption import SIGNALS, StopRequest
from convnext_yolo.recipes.resume import is_finished
from convnext_yolo.recipes.tracking import read_metrics

from .conftest import STEPS, TinyRun, environment, free_port, processes_with
from .forkserver import ForkServer
from .short_runs import TRAIN, train, wait_for_step

EVALUATING = str(Path(__file__).with_name("ranks_stopped_evaluating.py"))
# Six batches for each of two ranks.
EVALUATIONS = {
    "evaluation": {"every_epochs": 1, "batch": 2},
    "checkpoint": {"every_steps": 1000},
}
FOR_EVER = {"epochs": 1000, "warmup_epochs": 1}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_the_flag_and_further_ones_are_ignored(number: signal.Signals) -> None:
    """To the end of the process: they would change its exit code."""
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with StopRequest():
        pass
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    try:
        with StopRequest() as stop:
            assert not stop.asked
            signal.raise_signal(number)
            assert stop.asked and stop.reason == number.name
            signal.raise_signal(signal.SIGTERM)
            assert stop.reason == number.name  # the first
        for n in SIGNALS:
            signal.raise_signal(n)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_closed_terminal_does_not_end_what_runs_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def last_step(run: TinyRun) -> int:
    return int(max(r["step"] for r in read_metrics(run.folder) if r["kind"] == "train"))


@pytest.mark.process
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_one_rank_is_asked_and_all_save_the_same_step(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], number: signal.Signals
) -> None:
    """The exit code is the scheduler's, where the recipe names one; the run goes on from there."""
    sections = {"every_steps": 1000, "stop_exit_code": 99 if number == signal.SIGUSR1 else 0}
    run = tiny_run(f"stopped-{number.name}", schedule=FOR_EVER, checkpoint=sections)
    job = fork_server.start(2, *TRAIN, str(run.recipe))
    wait_for_step(run, 2, job)
    os.kill(job.processes[1], number)
    codes = job.wait()
    assert set(codes) <= {sections["stop_exit_code"], -signal.SIGKILL} and -9 not in codes[:1]
    [newest] = published(run.folder / "checkpoints")
    saved = load_checkpoint(newest)
    assert saved.step == last_step(run)  # every step that was made is in it
    assert "stopped by a signal" in job.output and f"step {saved.step} is saved" in job.output
    assert "Traceback" not in job.output

    output = train(fork_server, run, 2, "--schedule.epochs", str((saved.step + 2) / 9))
    assert f"resuming at step {saved.step} of {saved.step + 2}" in output


@pytest.fixture(scope="module")
def evaluated(fork_server: ForkServer, tiny_run: Callable[..., TinyRun]) -> TinyRun:
    """A run with two evaluations that nobody breaks off."""
    run = tiny_run("evaluated", **EVALUATIONS)
    train(fork_server, run, 2)
    return run


@pytest.mark.process
@pytest.mark.parametrize(("where", "rank"), [("batch", "1"), ("metrics", "0"), ("metrics", "1")])
def test_an_evaluation_is_broken_off_and_made_up_for(
    fork_server: ForkServer,
    tiny_run: Callable[..., TinyRun],
    evaluated: TinyRun,
    where: str,
    rank: str,
) -> None:
    """In the first evaluation, after step 9 of 12; and in the last, after which nothing else is."""
    for epochs, stop_step in ((STEPS / 9, 9), (0.67, 6)):
        run = tiny_run(f"broken-off-{where}-{rank}-{stop_step}", **EVALUATIONS)
        schedule = ["--schedule.epochs", str(epochs)]
        job = fork_server.start(2, EVALUATING, where, rank, str(run.recipe), *schedule)
        assert job.wait() == [0, 0], job.output
        assert f"step {stop_step} is saved" in job.output
        saved = load_checkpoint(published(run.folder / "checkpoints")[0])
        assert (saved.step, saved.state["evaluated_step"]) == (stop_step, 0), job.output
        assert not is_finished(load_recipe([run.recipe], schedule))
        assert [r for r in read_metrics(run.folder) if r["kind"] == "val"] == []

        train(fork_server, run, 2, *schedule)
        steps = [r["step"] for r in read_metrics(run.folder) if r["kind"] == "val"]
        assert steps == sorted({stop_step, round(epochs * 9)})
        last = load_checkpoint(published(run.folder / "checkpoints")[0])
        assert is_finished(load_recipe([run.recipe], schedule))
        assert last.state["evaluated_step"] == last.step
        if epochs == STEPS / 9:
            assert run.sha256() == evaluated.sha256()


@pytest.mark.process
@pytest.mark.parametrize("launcher", ["deepspeed", "launch local", "torchrun"])
def test_sigterm_to_the_front_process_leaves_nobody(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], launcher: str
) -> None:
    """Also to `deepspeed`, which dies at once and leaves its ranks to themselves."""
    name = launcher.replace(" ", "-")
    wandb = "offline" if launcher == "launch local" else "off"  # its processes must go too
    run = tiny_run(f"front-{name}", wandb, schedule=FOR_EVER, checkpoint={"every_steps": 1000})
    process = run.start(launcher)
    wait_for_step(run, 3)
    os.kill(process.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + 10
    process.communicate(timeout=60)
    while left := processes_with(str(run.recipe)):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.05)  # between two looks
    assert time.monotonic() < deadline_s, "nobody is left, but it took longer than ten seconds"
    [newest] = published(run.folder / "checkpoints")
    saved = load_checkpoint(newest)
    assert saved.step == last_step(run)
    output = train(fork_server, run, 1, "--schedule.epochs", str((saved.step + 1) / 9))
    assert re.search(rf"resuming at step {saved.step} of {saved.step + 1} ", output), output


@pytest.mark.process
def test_a_front_that_is_gone_before_its_ranks_have_met(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    """While they import, nobody hears a signal: they find out when they begin."""
    run = tiny_run("front-at-start", schedule=FOR_EVER, checkpoint={"every_steps": 1000})
    process = run.start("deepspeed")
    deadline_s = time.monotonic() + 60
    while not any(imports_torch(rank) for rank in ranks_of(run)):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.01)  # between two looks
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    while left := processes_with(str(run.recipe)):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.05)  # between two looks
    [newest] = published(run.folder / "checkpoints")
    assert load_checkpoint(newest).step <= 2


def ranks_of(run: TinyRun) -> list[Path]:
    """The folders in /proc of those processes of a run that are no launchers."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = line.read_text().split("\0")
            if str(run.recipe) in words and not any("deepspeed" in word for word in words):
                found.append(line.parent)
    return found


def imports_torch(process: Path) -> bool:
    with contextlib.suppress(OSError):
        return "libtorch" in (process / "maps").read_text()
    return False


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_rank_that_meets_the_others_ends_at_once(
    tiny_run: Callable[..., TinyRun], number: signal.Signals
) -> None:
    """It waits outside of Python, where no handler of ours would be called for half an hour."""
    run, port = tiny_run(f"meeting-{number.name}"), free_port()
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, *TRAIN, str(run.recipe)], env={**environment(), **world}
    )
    deadline_s = time.monotonic() + 60
    while not is_listening(port):
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.05)  # between two looks
    process.send_signal(number)
    assert process.wait(10) == -number


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
