"""Ranks that no longer get on: which one do the others wait for?

In a collective all wait for the last, so a hang anywhere stops every rank, and each looks alike
from outside. But they go through the same phases in the same order, and count them
(`recipes/heartbeat.py`): the rank with the lowest count is the one behind.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from .rank import Rank

TELL_S = 120.0  # then it is told: COCO's metrics alone take a minute
LIMIT_S = 600  # then the job is ended, unless it was launched with another
_STATES = {"T": ", its process is stopped", "D": ", it waits for a disk or a file system"}


class StallDetector:
    """Tells once of each stall, and when one has lasted too long.

    Args:
        limit_s: after so long without progress the job is to be ended; 0: never.
        logs: the folder of the ranks' logs.
    """

    def __init__(self, limit_s: float, logs: Path):
        self.limit_s, self.logs = limit_s, logs
        self._told: float | None = None  # since when the stall lasts that was told of

    def look(self, ranks: Sequence[Rank], now: float) -> tuple[Rank | None, str]:
        """Looks at all ranks that run.

        Returns:
            The rank whose stacks are to be shown, since its stall was found now, if any; and the
            reason to end the job for that rank's sake, empty while there is none.
        """
        since_s = max((rank.place.since_s for rank in ranks), default=now)
        if self._told is not None and since_s > self._told:
            _tell(f"the ranks get on again, after {since_s - self._told:.0f} s")
            self._told = None
        lasts_s = now - since_s
        tell_s = min(TELL_S, self.limit_s / 2) if self.limit_s else TELL_S
        if lasts_s < tell_s:
            return None, ""
        last = behind(ranks)
        if self.limit_s and lasts_s >= self.limit_s:
            why = f"no rank got on for {lasts_s:.0f} s, and this one was behind, in"
            return last, f"{why} {_at(last, now)}"
        if self._told is not None:
            return None, ""
        self._told = since_s
        log = self.logs / f"rank-{last.number}.log"
        _tell(
            f"no rank gets on for {lasts_s:.0f} s: behind is rank {last.number} on {last.host}, "
            f"in {_at(last, now)}{_others(ranks, last)}; its stacks go to {log}"
        )
        return last, ""


def behind(ranks: Sequence[Rank]) -> Rank:
    """The rank that the others wait for; of those in one phase, one that can't run or came last."""
    return min(ranks, key=lambda r: (r.place.count, r.place.state not in _STATES, -r.place.since_s))


def _at(rank: Rank, now: float) -> str:
    place = rank.place
    return f"{place} for {now - place.since_s:.0f} s{_STATES.get(place.state, '')}"


def _others(ranks: Sequence[Rank], last: Rank) -> str:
    places = sorted({str(rank.place) for rank in ranks if rank is not last})
    return f"; others in {', '.join(places)}" if places else ""


def _tell(text: str) -> None:
    print(f"convnext-yolo: {text}", file=sys.stderr, flush=True)
