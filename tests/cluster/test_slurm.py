"""A Slurm job that is interrupted goes on by itself, to the very same weights."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ..recipes.conftest import STEPS
from .cluster import Cluster
from .hosts import other_deepspeed
from .jobs import Job, rank_on, wait_until_nothing_is_left

pytestmark = [pytest.mark.process, pytest.mark.cluster]


def interrupt(cluster: Cluster, job: Job, how: str) -> None:
    """Ends a job's start as Slurm would do."""
    words = {
        "requeue": ["scontrol", "requeue", job.number],
        # slurmctld looks at limits every 30 s, and warns up to 30 s early: now, at the next look
        "time limit": ["scontrol", "update", f"JobId={job.number}", "EndTime=now+45"],
        "USR1": ["scancel", "--signal=USR1", job.number],
    }[how]
    cluster.hosts[0].run(words)


def check_same(slurm: Job, uninterrupted: Job) -> None:
    """To the bit, in weights, average and moments too."""
    assert slurm.batches() == uninterrupted.batches()
    assert slurm.run.losses() == uninterrupted.run.losses()
    found, wanted = slurm.tensors(), uninterrupted.tensors()
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


@pytest.mark.parametrize(
    "interruptions",
    [
        ("requeue", "time limit"),
        pytest.param(("USR1", "requeue", "time limit", "requeue"), marks=pytest.mark.long),
    ],
    ids=" and ".join,
)
@pytest.mark.timeout(900)
def test_interrupted_jobs_go_on(
    interruptions: tuple[str, ...], cluster: Cluster, job: Callable[..., Job], uninterrupted: Job
) -> None:
    """After the second, the fourth step and so on, which is the last before the job ends."""
    slurm = job("slurm", f"slurm_{len(interruptions)}")
    points = [f"step-{2 * turn}" for turn in range(1, len(interruptions) + 1)]
    for point in points:
        slurm.hold(point)
    slurm.start()
    for point, how in zip(points, interruptions, strict=True):
        slurm.wait_until_held(point, timeout_s=120)
        interrupt(cluster, slurm, how)
        slurm.wait_until_released(point, timeout_s=60)  # by the signal
        if how == "time limit":  # else it would be the same for the next start
            cluster.hosts[0].run(["scontrol", "update", f"JobId={slurm.number}", "TimeLimit=60"])
    slurm.succeed()
    starts = re.findall(rf"(?:from|resuming at) step (\d+) of {STEPS}", slurm.said())
    assert starts == [str(2 * turn) for turn in range(len(interruptions) + 1)], slurm.said()
    check_same(slurm, uninterrupted)
    wait_until_nothing_is_left(cluster)


def test_a_job_does_not_begin_on_hosts_that_differ(
    cluster: Cluster, job: Callable[..., Job], tmp_path: Path
) -> None:
    """Which ones it gets, only the job knows: so there the doctor compares them."""
    a, b = cluster.hosts
    slurm = job("slurm", "slurm_doctor", doctor=True)
    with other_deepspeed(b, "0.18.1", tmp_path):
        slurm.start()
        slurm.wait_until_said("mend the errors first", timeout_s=120)
    slurm.wait_until_gone()
    said = slurm.said()
    assert re.search(rf"(?m)^error   {b.name}: deepspeed is 0\.18\.1, but \S+ on {a.name};", said)
    assert re.search(r"(?m)^all-reduce over 2 hosts \(gloo\): [\d.]+ Gbit/s", said), said
    assert (
        "training seed_convnext_yolo" not in said and not slurm.run.folder.joinpath("logs").exists()
    )
    wait_until_nothing_is_left(cluster)


@pytest.mark.long
def test_a_job_of_which_a_rank_fails_ends(cluster: Cluster, job: Callable[..., Job]) -> None:
    """It would fail again: it is not requeued, and its log says who went first."""
    _, b = cluster.hosts
    slurm = job("slurm", "slurm_failed")
    slurm.hold("step-7")
    slurm.start()
    slurm.wait_until_held("step-7", timeout_s=120)
    os.kill(rank_on(b), signal.SIGKILL)
    slurm.release("step-7")
    slurm.wait_until_gone()
    said = slurm.said()
    assert re.search(rf"rank 1 on {b.name} went first: killed by SIGKILL", said), said
    assert "back into the queue" not in said and slurm.steps_published() == [4]
    wait_until_nothing_is_left(cluster)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_that_loses_a_host_goes_on(
    cluster: Cluster, job: Callable[..., Job], uninterrupted: Job
) -> None:
    """It says which, goes back into the queue, and starts when there are two hosts again."""
    _, b = cluster.hosts
    slurm = job("slurm", "slurm_lost")
    slurm.hold("step-7")
    slurm.start()
    slurm.wait_until_held("step-7")
    cluster.kill(b)
    slurm.release("step-7")
    slurm.wait_until_said(rf"rank 1 on {b.name} went first: its guard is gone", timeout_s=60)
    cluster.restart(b)
    slurm.succeed()
    assert re.findall(rf"resuming at step (\d+) of {STEPS}", slurm.said()) == ["4"], slurm.said()
    check_same(slurm, uninterrupted)
    wait_until_nothing_is_left(cluster)
