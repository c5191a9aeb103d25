"""A host is lost, or its link: the job ends with the reason, or goes on without what was lost."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable

import pytest

from ..recipes.conftest import STEPS
from .cluster import Cluster
from .jobs import Job, rank_on, wait_until_nothing_is_left

pytestmark = [pytest.mark.process, pytest.mark.cluster]

BY_HAND = ("torchrun", "accelerate")
LOST_S = 60.0  # until the job has ended on the other host
# where it happens: the step to go on from. Checkpoints are of step 4, 8 and 12, and the evaluation
# is the last one.
MOMENTS = {"step-7": 4, "checkpoint-8": 4, "evaluation": 8}


def check_whole(lost: Job, uninterrupted: Job) -> None:
    """All steps were done, once, on the same batches, with the same losses."""
    assert lost.steps_published()[0] == STEPS
    assert not list((lost.run.folder / "checkpoints").glob("*.partial"))
    assert lost.batches() == uninterrupted.batches()
    assert lost.run.losses() == [pytest.approx(s, abs=1e-4) for s in uninterrupted.run.losses()]


@pytest.mark.parametrize(
    ("moment", "stage"),
    [
        ("step-7", 1),
        ("checkpoint-8", 3),
        ("evaluation", 1),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("step-7", 3), ("checkpoint-8", 1), ("evaluation", 3))
        ),
    ],
)
def test_a_host_is_killed(
    moment: str, stage: int, cluster: Cluster, job: Callable[..., Job], uninterrupted: Job
) -> None:
    """Only the steps since the last checkpoint are lost, and the other host finishes."""
    _, b = cluster.hosts
    lost = job("deepspeed", f"killed_{moment}_{stage}", stage)
    lost.hold(moment)
    lost.start("--max-restarts", "1")
    lost.wait_until_held(moment)
    assert lost.steps_published()[0] == MOMENTS[moment]
    killed_s = time.monotonic()
    cluster.kill(b)
    lost.release(moment)
    first = rf"^rank 1 on {b.address} went first: its guard is gone: .*; restart 1 of 1$"
    lost.wait_until_said(f"(?m){first}", LOST_S)
    assert time.monotonic() - killed_s < LOST_S
    lost.succeed()
    assert re.search(rf"resuming at step {MOMENTS[moment]} of {STEPS}", lost.log(0)), lost.log(0)
    check_whole(lost, uninterrupted)
    wait_until_nothing_is_left(cluster)


@pytest.mark.parametrize(
    "launcher", ["no ssh", *(pytest.param(n, marks=pytest.mark.long) for n in BY_HAND)]
)
def test_a_host_that_was_started_by_hand_is_killed(
    launcher: str, cluster: Cluster, job: Callable[..., Job]
) -> None:
    """Each host has a front of its own; the first one's knows the ranks of all."""
    _, b = cluster.hosts
    lost = job(launcher, f"killed_by_hand_{launcher}".replace(" ", "_"))
    lost.hold("step-7")
    lost.start()
    lost.wait_until_held("step-7")
    killed_s = time.monotonic()
    cluster.kill(b)  # the rank on the other host waits at the gate, and would so in NCCL
    code = lost.fronts[0].wait(LOST_S)
    assert code and time.monotonic() - killed_s < LOST_S
    sentence = rf"error: rank [01] on {b.name} went first: its guard is gone"
    assert re.search(sentence, lost.said()), lost.said()
    wait_until_nothing_is_left(cluster)
    assert lost.steps_published() == [4]


@pytest.mark.long
def test_the_first_of_hosts_that_were_started_by_hand_is_killed(
    cluster: Cluster, job: Callable[..., Job]
) -> None:
    """Its front is gone as well; the other host says so, and ends."""
    a, _ = cluster.hosts
    lost = job("torchrun", "first_killed")
    lost.hold("step-7")
    lost.start()
    lost.wait_until_held("step-7")
    cluster.kill(a)
    assert lost.fronts[1].wait(LOST_S)
    assert f"error: the command on host 0 ({a.address}:29600) is gone" in lost.said()
    wait_until_nothing_is_left(cluster)


def test_a_link_is_cut_for_a_while(
    cluster: Cluster, job: Callable[..., Job], uninterrupted: Job
) -> None:
    """The run goes on, or starts again on both hosts."""
    _, b = cluster.hosts
    cut = job("deepspeed", "cut_for_a_while")
    cut.hold("step-6")
    cut.start("--max-restarts", "1")
    cut.wait_until_held("step-6")
    cluster.cut(b)
    cut.release("step-6")
    time.sleep(5)  # so long it is cut
    cluster.join(b)
    cut.succeed()
    check_whole(cut, uninterrupted)
    wait_until_nothing_is_left(cluster)


@pytest.mark.parametrize(
    "is_off", [False, pytest.param(True, marks=pytest.mark.long)], ids=["cable", "power"]
)
def test_a_link_is_cut_for_good(is_off: bool, cluster: Cluster, job: Callable[..., Job]) -> None:
    """The job ends with the reason, on both sides; so where the host has lost its power."""
    _, b = cluster.hosts
    cut = job("deepspeed", f"cut_for_good_{is_off}")
    cut.hold("step-6")
    cut.start()
    cut.wait_until_held("step-6")
    cluster.cut(b)
    if is_off:
        cluster.kill(b)
    cut.release("step-6")
    (code,) = cut.finish(LOST_S)
    assert code, cut.said()
    sentence = rf"rank 1 on {b.address} went first: no sign of life for \d+ s"
    assert re.search(sentence, cut.said().splitlines()[-1]), cut.said()
    wait_until_nothing_is_left(cluster, LOST_S)
    assert cut.steps_published() == [4]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_that_hangs_is_named(
    launcher: str, cluster: Cluster, job: Callable[..., Job]
) -> None:
    """Its process is stopped; the other waits for it in a collective, and looks well."""
    _, b = cluster.hosts
    hung = job(launcher, f"hung_{launcher}")
    hung.hold("step-6")
    hung.start("--stall-s", "60")
    hung.wait_until_held("step-6")
    os.kill(rank_on(b), signal.SIGSTOP)
    hung.release("step-6")
    assert all(hung.finish(100)), hung.said()
    who = f"rank 1 on {b.address}" if launcher == "deepspeed" else rf"rank [01] on {b.name}"
    where = r"in step 6 \(data\) for \d+ s, its process is stopped"
    assert re.search(f"behind is {who}, {where}; others in step 6", hung.said())
    sentence = rf"(?m)^.*{who} went first: no rank got on for 6\d s.* {where}"
    assert len(re.findall(sentence, hung.said())) == len(hung.fronts), hung.said()
    wait_until_nothing_is_left(cluster)
