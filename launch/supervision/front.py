"""The front of a job: starts its launcher, and speaks with the guards of its ranks on every host.

Signals to this process go to the ranks, through their guards (`guard.py`), not to the launcher:
DeepSpeed's would end the ranks of other jobs on these hosts as well. When one rank fails, the
others are ended `COLLECT_S` later, so that no job waits for the ten minutes and more that a
collective may take, and the outcome says which went first and why.
"""

import hmac
import os
import secrets
import selectors
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from ..addresses import address_for
from ..command import Command, Ranks
from ..job import LaunchError
from .lifeline import BEAT_S, FRONT, LOGS, LOST_S, STOP_S, Lines
from .processes import any_marked, has_ended, kill_group, kill_marked
from .rank import Outcome, Rank, first_of, lost_hosts
from .stall import StallDetector

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# From the first failure until the rest is ended: so long, others may tell theirs.
COLLECT_S = 10.0
SILENT_S = 3 * BEAT_S  # then, who has not been heard for so long is lost
START_S = 180.0  # between the first rank and the last
LEAVE_S = 10.0  # for a launcher, when all ranks are gone, and the other way round


class Front:
    """The launcher and the connections to the guards of its ranks.

    Args:
        command: starts the launcher.
        expected: its ranks.
        stall_s: after so long without progress of any rank the job is ended; 0: never.
    """

    def __init__(self, command: Command, expected: Ranks, stall_s: float):
        self.expected, self.token = expected, secrets.token_hex(16)
        address = address_for(expected.callers)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.create_server((address, 0), family=family)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        front = f"{address}:{self.listener.getsockname()[1]}:{self.token}"
        expected.logs.mkdir(parents=True, exist_ok=True)
        print(f"$ {command}", flush=True)
        command = command.with_rank_environment({FRONT: front, LOGS: str(expected.logs)})
        command.write_files()
        self.ranks: list[Rank] = []
        self.stall = StallDetector(stall_s, expected.logs)
        self.signals: list[int] = []
        self.abandoned = False
        self.first_s = float("inf")  # when the first rank came
        self.signalled_s = float("inf")  # when the first signal was passed on
        self.stop_by = self.end_by = self.leave_by = float("inf")
        # Under nohup a terminal may close: what was ignored before stays so.
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heeded = [n for n in SIGNALS if not (nohup and n == signal.SIGHUP)]
        self._before = {n: signal.signal(n, self._on_signal) for n in heeded}
        self._beat_s = 0.0
        try:
            self.launcher = subprocess.Popen(
                command.words,
                # marked as the job's, its environment file or not
                env={**os.environ, **command.environment, FRONT: front},
                start_new_session=True,
            )
        except OSError as error:
            self._close()
            raise LaunchError(f"{command.words[0]}: can't be started ({error})") from None

    def __enter__(self) -> "Front":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_launcher()
        self._close()

    def _end_launcher(self) -> int:
        if self.launcher.returncode is None:  # else its number may be another's by now
            kill_group(self.launcher)
        kill_marked(self.token)
        return self.launcher.wait()

    def _close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.selector.close()
        self.listener.close()
        for rank in self.ranks:
            if rank.lines:
                rank.lines.connection.close()

    def _on_signal(self, number: int, _: object) -> None:
        self.signals.append(number)

    def run(self) -> Outcome:
        """Waits until launcher and ranks are gone."""
        asked = 0
        while not self._is_over():
            for key, _ in self.selector.select(timeout=0.1):
                self._hear(key)
            for number in self.signals[asked:]:
                asked += 1
                self._pass_on(number)
            self._watch(time.monotonic())
        return self._outcome()

    def _is_over(self) -> bool:
        """Whether all have gone; the launcher's own processes get a while to leave."""
        if not has_ended(self.launcher):
            return False
        if self._running():
            return False
        return not any_marked(self.token) or time.monotonic() > self.leave_by

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.code is None and not rank.lost]

    def _hear(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self.listener:
            self._accept()
            return
        caller: _Caller = key.data
        now = time.monotonic()
        try:
            for message in caller.lines.receive():
                if caller.rank is None:
                    caller.rank = self._welcome(caller.lines, message)
                else:
                    caller.rank.take(message, now)
        except (OSError, KeyError, TypeError, ValueError):
            self.selector.unregister(key.fileobj)
            if caller.rank is None:  # a stranger
                caller.lines.connection.close()
            elif caller.rank.code is None:
                caller.rank.lose("its guard is gone: the host, or the guard, was ended", now)
                caller.rank.ended_by_us = now > self.end_by

    def _accept(self) -> None:
        """Takes a call; who it is, it says when it likes."""
        connection, _ = self.listener.accept()
        connection.settimeout(2)
        self.selector.register(connection, selectors.EVENT_READ, _Caller(Lines(connection)))

    def _welcome(self, lines: Lines, hello: dict[str, Any]) -> Rank:
        """A rank, by its guard's first words.

        Raises:
            ConnectionError, KeyError, ValueError: it is none of ours.
        """
        if not hmac.compare_digest(str(hello["token"]), self.token):
            raise ConnectionError("not one of ours")
        number = int(hello["rank"])
        host = self.expected.hosts.get(number, str(hello["host"]))
        rank = Rank(number, host, lines, time.monotonic())
        rank.place.since_s = rank.heard_s
        self.first_s = min(self.first_s, rank.heard_s)
        self.ranks.append(rank)
        if self.signals:
            rank.send(type="signal", number=self.signals[0])
        return rank

    def _pass_on(self, number: int) -> None:
        """A signal, to every rank. The second Ctrl-C is meant by force."""
        for key, _ in self.selector.select(timeout=0):  # whoever has come meanwhile
            self._hear(key)
        if not self.ranks:  # nobody is there yet; whoever comes finds nobody, and ends
            kill_group(self.launcher)
        now = time.monotonic()
        if number == signal.SIGINT and self.signals.count(signal.SIGINT) > 1:
            self.end_by = min(self.end_by, now)
        self.signalled_s = min(self.signalled_s, now)
        self.stop_by = min(self.stop_by, now + STOP_S)
        for rank in self._running():
            rank.send(type="signal", number=number)

    def _watch(self, now: float) -> None:
        """Beats, silences, deadlines."""
        if now > self._beat_s + BEAT_S:
            self._beat_s = now
            for rank in self._running():
                rank.send(type="beat")
        for number in self._missing() if now > self.first_s + START_S else ():
            # the others would wait for it for half an hour
            rank = Rank(number, self.expected.hosts[number], None, now)
            self.ranks.append(rank)
            rank.lose(f"it did not come within {START_S:.0f} s", now)
        if not self.signals and self.end_by == float("inf"):
            self._watch_progress(now)
        failures = [rank.ended_s for rank in self._failed()]
        if failures:
            self.end_by = min(self.end_by, min(failures) + COLLECT_S)
        self._end_late(now, now > min(self.end_by, self.stop_by))
        self._leave(now, bool(failures))

    def _watch_progress(self, now: float) -> None:
        """Has the stacks shown of a rank that the others wait for, or ends the job for its sake."""
        rank, reason = self.stall.look(self._running(), now)
        if rank and reason:
            rank.blame(reason)
            self.end_by = min(self.end_by, now)
        elif rank:
            rank.send(type="stacks")

    def _end_late(self, now: float, ending: bool) -> None:
        """Ranks that are silent are lost; when all is to end, so are those that run on."""
        for rank in self._running():
            silent_s = now - rank.heard_s
            if silent_s > (SILENT_S if ending else LOST_S):
                rank.lose(f"no sign of life for {silent_s:.0f} s", rank.heard_s)
                # it may have been silent before
                rank.ended_by_us = ending and rank.heard_s > self.end_by - 2 * BEAT_S
            elif ending:
                rank.send(type="kill")
                rank.ended_by_us = True

    def _leave(self, now: float, failed: bool) -> None:
        """Of launcher and ranks, who is left without the other follows it after a while."""
        running = self._running()
        waiting = bool(running) if has_ended(self.launcher) else bool(self.ranks) and not running
        if not waiting and not has_ended(self.launcher):
            self.leave_by = float("inf")
        elif self.leave_by == float("inf"):
            self.leave_by = now + LEAVE_S
        if now <= self.leave_by:
            return
        if not running and (failed or not self._missing()):
            kill_marked(self.token)  # a launcher that waits for a host that is gone
        elif running and has_ended(self.launcher) and not self.abandoned:
            self.abandoned = True  # by a launcher that somebody has ended
            self._pass_on(signal.SIGTERM)

    def _missing(self) -> list[int]:
        """The numbers of the ranks that have not come, as far as they are known."""
        here = {rank.number for rank in self.ranks}
        return [number for number in self.expected.hosts if number not in here]

    def _failed(self) -> list[Rank]:
        """After a signal, a rank's exit code is what its recipe says: only losses count."""
        return [
            rank
            for rank in self.ranks
            if (rank.lost or (rank.code and rank.ended_s < self.signalled_s))
            and (rank.stalled or not rank.ended_by_us)
        ]

    def _outcome(self) -> Outcome:
        code = self._end_launcher()
        code = 128 - code if code < 0 else code
        failed, codes = self._failed(), [rank.code or 0 for rank in self.ranks]
        if failed:
            first = first_of(failed)
            if first.code == 2 or not code:
                code = first.code if first.code and first.code > 0 else 1
            sentence = (
                f"rank {first.number} on {first.host} went first: {first.reason}; "
                f"its output is in {self.expected.logs}/rank-{first.number}.log"
            )
            return Outcome(code, sentence, lost_hosts(failed), bool(self.signals))
        if self.signals:
            # launchers make 1 of every code, and what was not there yet was ended by force
            code = max(codes, key=abs) if codes else -self.signals[0]
            code = 128 - code if code < 0 else code
            return Outcome(code, self._stopped(), stopped=True)
        if self.abandoned:
            code, why = code or 1, "somebody has ended the launcher"
            return Outcome(
                code, f"{why}; the ranks have stopped and saved, `--resume auto` goes on"
            )
        if codes and not self._missing() and len(codes) >= self.expected.count:
            code = 0  # all that was to be done is done, however the launcher has left
        return Outcome(code, f"the launcher ended with exit code {code}; see its output above")

    def _stopped(self) -> str:
        """Who asked, and who has not done what was asked."""
        sentence = f"stopped by {signal.Signals(self.signals[0]).name}"
        for rank in self.ranks:
            where = f"rank {rank.number} on {rank.host}"
            if rank.ended_by_us:
                return f"{sentence}; {where} did not stop in time and was ended"
            if rank.code and ": error: " in rank.reason:
                return f"{sentence}; {where}: {rank.reason}"
        return sentence


@dataclass
class _Caller:
    """A connection, and the rank that it turned out to be."""

    lines: Lines
    rank: Rank | None = None
