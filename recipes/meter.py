"""The pace of a run: steps become records for the tracker and lines of progress."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Meter:
    """Times steps between two records.

    Args:
        batch: pictures a global step.
        total_steps: of the run.
        log_every: steps between records.
    """

    LINE_EVERY_S = 5.0  # nothing else is said in between

    def __init__(self, batch: int, total_steps: int, log_every: int):
        self.batch, self.total_steps, self.log_every = batch, total_steps, log_every
        self.said_s = 0.0
        self.restart()

    def restart(self) -> None:
        """Starts anew, after time that was not training."""
        self.since_s, self.waited_s, self.steps = time.monotonic(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for data."""
        start_s = time.monotonic()
        yield
        self.waited_s += time.monotonic() - start_s

    def is_due(self, step: int) -> bool:
        """Counts a step; says whether a record is due after it."""
        self.steps += 1
        return step % self.log_every == 0 or step == self.total_steps

    def read(self) -> dict[str, float]:
        """Speed and the share of time spent waiting for data, since the last record."""
        seconds = time.monotonic() - self.since_s
        speed, wait = self.steps * self.batch / seconds, self.waited_s / seconds
        self.restart()
        return {"images_per_s": round(speed, 2), "data_wait": round(wait, 4)}

    def say(self, record: dict[str, Any], losses: tuple[str, ...]) -> None:
        """Prints a line of progress, every few seconds at most."""
        step, speed = record["step"], record["images_per_s"]
        if time.monotonic() - self.said_s < self.LINE_EVERY_S and step != self.total_steps:
            return
        self.said_s = time.monotonic()
        minutes, seconds = divmod(int((self.total_steps - step) * self.batch / speed), 60)
        parts = "  ".join(f"{name} {record[name]:.4f}" for name in losses)
        print(
            f"step {step}/{self.total_steps}  epoch {record['epoch']:.1f}  {parts}  "
            f"{speed:.1f} img/s  {minutes}:{seconds:02d} left",
            flush=True,
        )
