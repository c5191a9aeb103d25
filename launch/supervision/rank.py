"""A rank, as its guard tells the front of it, and which of several failures was the cause."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .lifeline import Lines

# What ranks say when another one has gone.
_CONSEQUENCE = re.compile(
    r"closed by peer|reset by peer|connection (was )?(closed|refused|reset)|broken pipe|timed? ?out"
    r"|remote process|disconnect|SIGTERM|DistBackendError|DistNetworkError",
    re.IGNORECASE,
)


@dataclass
class Place:
    """Where a rank is, by the clock of the front."""

    count: int = 0
    step: int = 0
    doing: str = "start"
    since_s: float = 0.0
    state: str = ""  # of its process, as in /proc

    def __str__(self) -> str:
        return f"step {self.step} ({self.doing})" if self.count else "its start"


@dataclass
class Rank:
    """A rank. Times are those of the front's clock."""

    number: int
    host: str
    lines: Lines | None  # None: it never came
    heard_s: float
    code: int | None = None
    reason: str = ""
    lost: bool = False  # gone without a word
    stalled: bool = False  # the others waited for it, for too long
    ended_s: float = 0.0
    place: Place = field(default_factory=Place)

    def send(self, **message: Any) -> None:
        """A guard that is gone is found out by its silence."""
        with contextlib.suppress(OSError):
            if self.lines:
                self.lines.send(**message)

    def take(self, message: dict[str, Any], now: float) -> None:
        """Does what its guard says.

        Raises:
            KeyError, TypeError, ValueError: no guard says such a thing.
        """
        self.heard_s = now
        if message["type"] == "exit":
            self.code, self.ended_s = int(message["code"]), now
            self.reason = self.reason or str(message["reason"])
        elif message["type"] == "beat":
            count, since_s = int(message["count"]), now - float(message["for_s"])
            if count == self.place.count:  # the same time, told with another delay
                since_s = self.place.since_s
            place = int(message["step"]), str(message["doing"])
            self.place = Place(count, *place, since_s, str(message["state"]))

    def lose(self, reason: str, now: float) -> None:
        """It is gone, and nobody has said why."""
        self.lost, self.reason, self.ended_s = True, reason, now

    def blame(self, reason: str) -> None:
        """The job is to end for its sake; it still runs."""
        self.stalled, self.reason = True, reason


@dataclass(frozen=True)
class Outcome:
    """How a launcher's run went."""

    code: int
    sentence: str = ""
    lost_hosts: frozenset[str] = frozenset()
    stopped: bool = False  # by a signal


def first_of(failed: Sequence[Rank]) -> Rank:
    """The cause: a stall, then a loss, then what does not tell of another's failure."""
    return min(
        failed,
        key=lambda r: (not r.stalled, not r.lost, bool(_CONSEQUENCE.search(r.reason)), r.ended_s),
    )
