"""Runs of `convnext-yolo launch` on the cluster, watched: a rank on each host, or both on one."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from convnext_yolo.recipes.checkpoint import load_checkpoint, published

from ..recipes.conftest import TinyRun
from . import services
from .cluster import Cluster
from .hosts import ClusterError, Host, HostProcess, wait_for

WATCHED = Path(__file__).with_name("watched")
PORT = "29500"  # of the cluster's own network, where it is always free
BOTH = ("0", "1")  # ranks
START_S = 90.0  # two cores import torch twice at once


@dataclass
class Job:
    """One run, and all that is started to train it. Its files lie beside the run's folder."""

    cluster: Cluster
    run: TinyRun
    launcher: str  # a word of `launch`; "one host": both ranks on the first one
    doctor: bool = False
    fronts: list[HostProcess] = field(default_factory=list)
    number: str = ""  # Slurm's

    @property
    def folder(self) -> Path:
        return self.run.recipe.parent

    def start(self, *options: str) -> Job:
        """Starts the front process, for launchers by hand one on each host."""
        environment = {"PYTHONPATH": str(WATCHED), "CLUSTER_WATCH": str(self.folder)}
        here = self.launcher in ("local", "one host", "deepspeed", "slurm")
        self.fronts = [
            host.start(
                [*self._words(number), *options],
                env=environment,
                output=self.folder / f"front-{host.name}.txt",
            )
            for number, host in enumerate(self.cluster.hosts[: 1 if here else 2])
        ]
        if self.launcher == "slurm":
            self.finish(timeout_s=60)
            self.number = re.findall(r"^Submitted batch job (\d+)$", self.said(), re.M)[-1]
        return self

    def _words(self, number: int) -> list[str]:
        """The command line on a host."""
        carried = ["--env", "PYTHONPATH", "--env", "CLUSTER_WATCH"]
        master = f"{self.cluster.hosts[0].address}:{PORT}"
        hostfile = str(self.cluster.hostfile)
        by_hand = ["--nodes", "2", "--node-rank", str(number), "--processes-per-node", "1"]
        launcher, more = {
            "one host": ("torchrun", ["--processes-per-node", "2"]),
            "local": ("local", ["--processes", "2"]),
            "deepspeed": ("deepspeed", ["--hostfile", hostfile, *carried]),
            "no ssh": (
                "deepspeed",
                ["--hostfile", hostfile, "--no-ssh", "--node-rank", str(number)],
            ),
            "torchrun": ("torchrun", [*by_hand, "--rdzv-endpoint", master]),
            "accelerate": ("accelerate", [*by_hand, "--master", master]),
            "slurm": (
                "slurm",
                ["--nodes", "2", "--gpus-per-node", "0", "--time", "60", "--warning-s", "20"],
            ),
        }[self.launcher]
        if not self.doctor:
            more = [*more, "--no-doctor"]
        program = [str(Path(sys.executable).with_name("convnext-yolo")), "launch", launcher]
        return [*program, "--config", str(self.run.recipe), *more]

    def said(self) -> str:
        """What the fronts have printed, and under Slurm the job's log."""
        files = [*self.folder.glob("front-*.txt"), *self.run.folder.glob("launch/slurm-*.log")]
        return "".join(file.read_text() for file in sorted(files))

    def finish(self, timeout_s: float = 150) -> list[int]:
        """Waits for the fronts' ends; returns their exit codes."""
        ended = lambda: all(front.poll() is not None for front in self.fronts)  # noqa: E731
        self._wait(ended, "the job ends", timeout_s)
        return [front.returncode for front in self.fronts]

    def succeed(self) -> None:
        """Waits for the job's end, which must be a good one."""
        codes = self.finish()
        if self.launcher == "slurm":
            self.wait_until_gone()
        assert not any(codes), self.said()

    def wait_until_gone(self) -> None:
        """Waits until Slurm has nothing more to do with the job."""
        queue = ["squeue", "--noheader", f"--jobs={self.number}"]
        first = self.cluster.hosts[0]
        self._wait(lambda: not first.run(queue), "the job leaves the queue", 150)

    def hold(self, point: str) -> None:
        """Has ranks wait there, see watched/sitecustomize.py."""
        (self.folder / f"hold-{point}").touch()

    def wait_until_held(self, point: str, timeout_s: float = START_S) -> None:
        """Waits until both ranks wait there."""
        files = [self.folder / f"held-{point}-{rank}" for rank in BOTH]

        def held() -> bool:
            if self.launcher != "slurm":  # whose front has ended long ago
                assert all(front.poll() is None for front in self.fronts), self.said()
            return all(file.exists() for file in files)

        self._wait(held, f"both ranks come to {point}", timeout_s)

    def release(self, point: str) -> None:
        """Lets those go on that are left."""
        (self.folder / f"hold-{point}").unlink()

    def wait_until_released(self, point: str, timeout_s: float) -> None:
        """Waits until a rank that waits there is asked to stop."""
        gate = self.folder / f"hold-{point}"
        self._wait(lambda: not gate.exists(), f"a signal comes at {point}", timeout_s)

    def wait_until_said(self, pattern: str, timeout_s: float) -> None:
        """Waits for a line of a front."""
        found = lambda: re.search(pattern, self.said())  # noqa: E731
        self._wait(found, f"the front says {pattern!r}", timeout_s)

    def _wait(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        try:
            wait_for(condition, what, timeout_s)
        except ClusterError as error:
            raise AssertionError(f"{error}; what was said:\n{self.said()}") from error

    def log(self, rank: int) -> str:
        """What a rank has said, in all its starts."""
        return (self.run.folder / f"logs/rank-{rank}.log").read_text()

    def steps_published(self) -> list[int]:
        """The steps of the checkpoints that are there, newest first."""
        found = published(self.run.folder / "checkpoints")
        return [int(path.name.removeprefix("step-")) for path in found]

    def tensors(self) -> dict[str, Tensor]:
        """All of the newest checkpoint: weights, their average, moments."""
        return load_checkpoint(published(self.run.folder / "checkpoints")[0]).tensors

    def batches(self) -> dict[int, list[object]]:
        """Each global batch by its step: its micro-batches, with their ids and hashes."""
        parts: dict[tuple[int, int], list[object]] = {}
        for line in (self.folder / "batches.jsonl").read_text().splitlines():
            step, lane, *content = json.loads(line)
            # a step that was done twice, for a kill in between, had the same pictures both times
            assert parts.setdefault((step, lane), content) == content
        steps = sorted({step for step, _ in parts})
        return {n: [parts[k] for k in sorted(parts) if k[0] == n] for n in steps}


def rank_on(host: Host) -> int:
    """The process of the one rank that trains on a host, seen from here."""
    processes = host.processes(" train --config")
    # Its guard, under torchrun and Slurm a leader itself, has made it the leader of a session.
    leaders = [process for process in processes if os.getsid(process) == process]
    parents = {process: _parent(process) for process in leaders}
    return next(p for p in leaders if p not in parents.values() and parents[p] in processes)


def _parent(process: int) -> int:
    stat = Path(f"/proc/{process}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def left(cluster: Cluster, but: Sequence[str] = ()) -> dict[str, list[str]]:
    """All that runs on the hosts beside their daemons, and what has one of those words in it."""
    return {
        host.name: lines
        for host in cluster.hosts
        if host.alive
        and (
            lines := [
                line
                for line in host.processes().values()
                if not line.startswith(services.DAEMONS) and not any(word in line for word in but)
            ]
        )
    }


def wait_until_nothing_is_left(
    cluster: Cluster, timeout_s: float = 30, but: Sequence[str] = ()
) -> None:
    """Waits until the hosts are idle."""
    try:
        wait_for(lambda: not left(cluster, but), "nothing is left on the hosts", timeout_s)
    except ClusterError as error:
        raise AssertionError(f"{error}, but {left(cluster, but)}") from None
