"""Where the time of a step goes: data, forward, backward, optimizer, communication.

Collectives run inside the backward pass and the optimizer; their time is taken from those and
counted as communication. On a GPU work is only queued: to time it, the phases of a *measured* step
wait for the device, and one step in `tracking.log_every` is measured while all others run free.
(What DeepSpeed starts without waiting, such as gathering ahead at stage 3, counts where it is
waited for.)
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .heartbeat import heartbeat

PHASES = ("data", "forward", "backward", "optimizer", "communication")


class StepClock:
    """Times the phases of the steps that are measured, and the wait for data of all.

    Args:
        device: whose queue is waited for.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.waited_s = 0.0  # for data, since it was last set back
        self.seconds = dict.fromkeys(PHASES, 0.0)  # of the last measured step
        self._measures = False
        self._collectives = _Collectives()

    @contextmanager
    def step(self, measure: bool) -> Iterator[None]:
        """A step; `measure` says whether its phases are timed."""
        self._measures = measure
        if measure:
            self.seconds = dict.fromkeys(PHASES, 0.0)
        with self._collectives.timed(measure):
            yield
        self._measures = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a step."""
        heartbeat().beat(name)
        start_s, collectives_s = self._now(), self._collectives.seconds
        yield
        if not self._measures and name != "data":
            return
        taken_s = self._now() - start_s
        if name == "data":
            self.waited_s += taken_s
        if self._measures:
            inside_s = self._collectives.seconds - collectives_s
            self.seconds["communication"] += inside_s
            self.seconds[name] += taken_s - inside_s

    @property
    def working_s(self) -> float:
        """What the last measured step took without communication: what this rank itself needs."""
        return sum(self.seconds.values()) - self.seconds["communication"]

    def _now(self) -> float:
        if self._measures and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Collectives:
    """Takes the place of DeepSpeed's own logger of collectives, which it looks for by name.

    That one ends the program at a collective that it does not know.
    """

    prof_all, prof_ops, verbose, debug = True, (), False, False

    def __init__(self) -> None:
        self.enabled, self.seconds = False, 0.0

    @contextmanager
    def timed(self, on: bool) -> Iterator[None]:
        """Whether DeepSpeed times its collectives, one by one."""
        if not on:
            yield
            return
        from deepspeed.comm import comm

        theirs, comm.comms_logger, self.enabled = comm.comms_logger, self, True
        try:
            yield
        finally:
            comm.comms_logger, self.enabled = theirs, False

    def append(self, kind: str, name: str, latency_ms: float, size: Any) -> None:
        """What DeepSpeed calls after a collective, with the sum of what its timer has ever seen."""
        from deepspeed.comm import comm

        self.seconds += latency_ms / 1e3
        comm.timers(name).reset()
