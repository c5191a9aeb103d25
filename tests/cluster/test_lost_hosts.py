"""A host is lost, or its link: the job ends with the reason, or goes on without what was lost."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..recipes.conftest import STEPS
from .cluster import Cluster
from .jobs import Job, wait_until_nothing_is_left

pytestmark = [pytest.mark.process, pytest.mark.cluster]

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
def test_a_rank_that_hangs_is_named(cluster: Cluster, job: Callable[..., Job]) -> None:
    """Its process is stopped; the other waits for it in a collective, and looks well."""
    _, b = cluster.hosts
    hung = job("deepspeed", "hung")
    hung.hold("step-6")
    hung.start("--stall-s", "60")
    hung.wait_until_held("step-6")
    processes = b.processes(" train --config")
    # Its guard has made it the leader of a session, in which its loader's workers are.
    (rank,) = (p for p in processes if parent(p) in processes and os.getsid(p) == p)
    os.kill(rank, signal.SIGSTOP)
    hung.release("step-6")
    (code,) = hung.finish(100)
    assert code, hung.said()
    where = r"in step 6 \(data\) for \d+ s, its process is stopped"
    assert re.search(rf"behind is rank 1 on {b.address}, {where}; others in step 6", hung.said())
    sentence = rf"rank 1 on {b.address} went first: no rank got on for 6\d s.* {where}"
    assert re.search(sentence, hung.said().splitlines()[-1]), hung.said()
    wait_until_nothing_is_left(cluster)


def parent(process: int) -> int:
    stat = Path(f"/proc/{process}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])
