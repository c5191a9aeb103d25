"""A rank, as its guard tells the front of it, and which of several failures was the cause."""

import contextlib
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .lifeline import Lines, Verdict

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
    ended_by_us: bool = False  # since the job was to end
    ended_s: float = 0.0
    is_own: bool = True  # the launcher that starts it is this front's
    is_judged: bool = False  # it reports to the first front as well
    verdict: Verdict | None = None  # of the first front
    place: Place = field(default_factory=Place)

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 + the signal that ended it. 0: none is known."""
        return 128 - self.code if self.code and self.code < 0 else self.code or 0

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
            if message["verdict"]:
                self.verdict = Verdict(**message["verdict"])
        elif message["type"] == "beat":
            count, since_s = int(message["count"]), now - float(message["for_s"])
            if count == self.place.count:  # the same time, told with another delay
                since_s = self.place.since_s
            place = int(message["step"]), str(message["doing"])
            self.place = Place(count, *place, since_s, str(message["state"]))
            self.is_judged = bool(message["judged"])
        elif message["type"] == "signal":
            signal.Signals(message["number"])

    def lose(self, reason: str, since_s: float) -> None:
        """It is gone since then, and nobody has said why."""
        self.lost, self.reason, self.ended_s = True, reason, since_s

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
    """The cause: a stall, then the earliest of what does not follow from another's failure.

    Of a mistake that all ranks find, one alone prints the sentence.
    """

    def order(rank: Rank) -> tuple[bool, bool, bool, float]:
        is_silent = rank.code == 2 and ": error: " not in rank.reason
        return not rank.stalled, _follows(rank, failed), is_silent, rank.ended_s

    return min(failed, key=order)


def lost_hosts(failed: Sequence[Rank]) -> frozenset[str]:
    """The hosts that are gone, not those on which a launcher has ended the guards."""
    return frozenset(rank.host for rank in failed if rank.lost and not _follows(rank, failed))


def _follows(rank: Rank, failed: Sequence[Rank]) -> bool:
    """Whether this failure is most likely another's consequence."""
    if rank.lost:  # where a rank fails, its launcher may end the others of its host, guards and all
        return any(
            one.host == rank.host and not one.lost and one.ended_s <= rank.ended_s for one in failed
        )
    return bool(_CONSEQUENCE.search(rank.reason))
