"""A signal to the front process, or Slurm's: both hosts are left clean, and others' work alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from .cluster import Cluster
from .hosts import wait_for
from .jobs import Job, wait_until_nothing_is_left

pytestmark = [pytest.mark.process, pytest.mark.cluster]

GONE_S = 30.0
LAUNCHERS = ("local", "deepspeed", "torchrun", "accelerate")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Somebody else's: to `pkill -f` it looks like a DeepSpeed launcher of ours.
SOMEBODYS = "python -u -m deepspeed.launcher.launch --somebody"
LIVES = ["bash", "-c", f"exec -a '{SOMEBODYS}' sleep 4321"]


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """Under nohup a front would ignore SIGHUP, as it should; pytest may be under it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def check_stopped(cluster: Cluster, job: Job, step: int) -> None:
    """The step is saved; nothing of the job is left on either host, and all of somebody else's."""
    wait_until_nothing_is_left(cluster, GONE_S, but=["--somebody"])
    assert job.steps_published()[0] == step
    for host in cluster.hosts:
        assert host.processes(SOMEBODYS), f"{host.name}: somebody else's process is gone"


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_front(
    launcher: str, number: signal.Signals, cluster: Cluster, job: Callable[..., Job]
) -> None:
    """Started by hand on each host, the signal to one of the fronts is enough."""
    for host in cluster.hosts:
        host.start(LIVES)
    stopped = job(launcher, f"{launcher}_{number.name}")
    stopped.hold("step-6")  # until the signal
    stopped.start()
    stopped.wait_until_held("step-6")
    stopped.fronts[0].send_signal(number)
    check_stopped(cluster, stopped, 6)
    assert not any(stopped.finish(10)), stopped.said()


def test_scancel(cluster: Cluster, job: Callable[..., Job]) -> None:
    """It ends the job for good."""
    for host in cluster.hosts:
        host.start(LIVES)
    stopped = job("slurm", "scancel")
    stopped.hold("step-6")
    stopped.start()
    stopped.wait_until_held("step-6")
    first = cluster.hosts[0]
    first.run(["scancel", stopped.number])
    check_stopped(cluster, stopped, 6)
    queue = ["squeue", "--noheader", f"--jobs={stopped.number}"]
    wait_for(lambda: not first.run(queue), "the job leaves the queue")
    assert "CANCELLED" in first.run(["scontrol", "show", "job", stopped.number])
