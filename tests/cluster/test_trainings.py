"""Trainings over two hosts under each launcher: the batches and losses of two ranks on one host."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ..recipes.conftest import STEPS, tiny_shards  # noqa: F401
from .cluster import Cluster
from .jobs import Job, wait_until_nothing_is_left

pytestmark = [pytest.mark.process, pytest.mark.cluster]


# Slurm's is in test_slurm.py as well, with interruptions
SLURM = pytest.param("slurm", marks=pytest.mark.long)


@pytest.mark.parametrize("launcher", ["deepspeed", "no ssh", "torchrun", "accelerate", SLURM])
def test_two_hosts_train_as_one(
    launcher: str, cluster: Cluster, job: Callable[..., Job], uninterrupted: Job
) -> None:
    has_doctor = launcher in ("deepspeed", "slurm")  # which then looks at both hosts
    two = job(launcher, f"two_hosts_{launcher}".replace(" ", "_"), doctor=has_doctor)
    two.hold("step-1")
    two.start()
    two.wait_until_held("step-1")
    assert all(host.processes(" train --config") for host in cluster.hosts)
    two.release("step-1")
    two.succeed()
    assert list(two.batches()) == list(range(1, STEPS + 1))
    assert two.batches() == uninterrupted.batches()
    assert two.run.losses() == [pytest.approx(s, abs=1e-4) for s in uninterrupted.run.losses()]
    wait_until_nothing_is_left(cluster)


def test_a_mistake_that_one_host_alone_finds_is_told(
    cluster: Cluster,
    job: Callable[..., Job],
    tiny_shards: Path,  # noqa: F811
) -> None:
    """Here it lacks the shards. The other waits for it meanwhile, and nothing is tried again."""
    a, b = cluster.hosts
    a.run(["cp", "-r", str(tiny_shards / "train"), "/run/scratch/train"])
    mistaken = job("deepspeed", "mistaken")
    mistaken.start("--data.train", "/run/scratch/train", "--max-restarts", "1")
    assert mistaken.finish(90) == [2], mistaken.said()
    last = mistaken.said().splitlines()[-1]
    says = rf"rank 1 on {b.address} went first: exit code 2: .*error: .*/run/scratch/train"
    assert re.search(says, last), mistaken.said()
    assert "restart" not in mistaken.said()
    wait_until_nothing_is_left(cluster)
