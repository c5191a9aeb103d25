"""The pace of a run: steps become records for the tracker and lines of progress."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .clock import StepClock
from .distributed import World
from .heartbeat import heartbeat
from .utilization import Utilization


class Meter:
    """Times steps between two records. All ranks call it alike.

    Args:
        world: the processes; their figures are put together.
        batch: pictures a global step.
        total_steps: of the run.
        log_every: steps between records.
        utilization: tells what share of the device's arithmetic a speed is.
    """

    LINE_EVERY_S = 5.0  # nothing else is said in between

    def __init__(
        self,
        world: World,
        batch: int,
        total_steps: int,
        log_every: int,
        utilization: Utilization,
    ):
        self.world, self.batch, self.total_steps = world, batch, total_steps
        self.log_every, self.utilization = log_every, utilization
        self.clock = StepClock(world.device)
        self.said_s = 0.0
        self.restart()

    def restart(self) -> None:
        """Starts anew, after time that was not training."""
        self.since_s, self.clock.waited_s, self.steps = time.monotonic(), 0.0, 0

    @contextmanager
    def step(self, number: int) -> Iterator[StepClock]:
        """Times global step `number`, from 1."""
        heartbeat().step = number
        with self.clock.step(self.is_due(number)):
            yield self.clock
        self.steps += 1

    def is_due(self, step: int) -> bool:
        """Whether a record is due after a step."""
        return step % self.log_every == 0 or step == self.total_steps

    def read(self) -> dict[str, Any]:
        """Figures since the last record, and of the measured step; collective.

        Seconds of the phases are the main rank's. The slowest and the fastest rank are so by what
        they need themselves, without communication: in that all wait for the slowest.
        """
        seconds = time.monotonic() - self.since_s
        speed, wait = self.steps * self.batch / seconds, self.clock.waited_s / seconds
        device = self.world.device
        mine = torch.tensor([self.clock.working_s, _peak_memory_mib(device)], device=device)
        everyone = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(everyone, mine)
        working_s, memory_mib = torch.stack(everyone).cpu().T
        self.restart()
        return {
            "images_per_s": round(speed, 2),
            "images_per_s_per_device": round(speed / self.world.size, 2),
            "mfu": self.utilization.share(speed / self.world.size),
            "data_wait": round(wait, 4),
            "memory_mib": round(float(memory_mib.max()), 1),
            **{f"time_{name}_s": round(s, 5) for name, s in self.clock.seconds.items()},
            "slowest_rank": int(working_s.argmax()),
            "slowest_rank_s": round(float(working_s.max()), 5),
            "fastest_rank_s": round(float(working_s.min()), 5),
        }

    def say(self, record: dict[str, Any], losses: tuple[str, ...]) -> None:
        """Prints a line of progress, every few seconds at most."""
        step, speed = record["step"], record["images_per_s"]
        if time.monotonic() - self.said_s < self.LINE_EVERY_S and step != self.total_steps:
            return
        self.said_s = time.monotonic()
        left = (self.total_steps - step) * self.batch
        minutes, seconds = divmod(int(left / max(speed, 0.01)), 60)  # it is rounded to hundredths
        parts = "  ".join(f"{name} {record[name]:.4f}" for name in losses if record[name])
        each = f" ({record['images_per_s_per_device']:.1f} each)" if self.world.size > 1 else ""
        mfu = f"  MFU {record['mfu']:.0%}" if record["mfu"] else ""
        print(
            f"step {step}/{self.total_steps}  epoch {record['epoch']:.1f}  {parts}  "
            f"{speed:.1f} img/s{each}{mfu}  {self._shares(record)}  "
            f"{minutes}:{seconds:02d} left",
            flush=True,
        )

    def _shares(self, record: dict[str, Any]) -> str:
        """Of the measured step: `data 2% forward 31% …`, and how far the ranks are apart."""
        phases = {name: record[f"time_{name}_s"] for name in self.clock.seconds}
        total_s = sum(phases.values()) or 1.0
        words = [f"{name} {s / total_s:.0%}" for name, s in phases.items()]
        if self.world.size > 1:
            words.append(
                f"ranks {record['fastest_rank_s']:.3f}–{record['slowest_rank_s']:.3f} s, slowest "
                f"{record['slowest_rank']}"
            )
        return " ".join(words)


def _peak_memory_mib(device: torch.device) -> float:
    """The most that this process has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
