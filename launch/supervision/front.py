"""The front of a job: starts its launcher, and speaks with the guards of its ranks on every host.

Signals to this process go to the ranks, through their guards (`guard.py`), not to the launcher:
DeepSpeed's would end the ranks of other jobs on these hosts as well. When one rank fails, the
others are ended `COLLECT_S` later, so that no job waits for the ten minutes and more that a
collective may take, and the outcome says which went first and why.

Where each host is started by itself, the ranks of all report to host 0's front as well, which then
does the same for the whole job; the other fronts take over its verdict.
"""

import os
import secrets
import signal
import time
from dataclasses import asdict

from ..command import Command, Ranks
from ..job import LaunchError
from .callers import GONE, Callers
from .lifeline import BEAT_S, COLLECT_S, FIRST, FRONT, LOGS, LOST_S, STOP_S, Verdict
from .processes import (
    allow_many_files,
    any_marked,
    has_ended,
    kill_group,
    kill_marked,
    start,
    write_files,
)
from .rank import Outcome, Rank, first_of, lost_hosts
from .stall import StallDetector

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
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
        allow_many_files()  # a connection for each rank
        self.expected, self.token = expected, secrets.token_hex(16)
        self.callers = Callers(expected, self.token)
        self.ranks = self.callers.ranks
        front = f"{self.callers.address}:{self.token}"
        print(f"$ {command}", flush=True)
        variables = {FRONT: front, LOGS: str(expected.logs)}
        first = expected.first_host
        if first and not first.is_this:
            variables[FIRST] = f"{first.address}:{first.port}:{first.token}"
        command = command.with_rank_environment(variables)
        write_files(command, expected.logs)
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
            # marked as the job's, its environment file or not
            environment = {**os.environ, **command.environment, FRONT: front}
            self.launcher = start(command, env=environment, start_new_session=True)
        except LaunchError:
            self._close()
            raise

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
        self.callers.close()

    def _on_signal(self, number: int, _: object) -> None:
        self.signals.append(number)

    def run(self) -> Outcome:
        """Waits until launcher and ranks are gone."""
        asked = 0
        while not self._is_over():
            self._hear(timeout_s=0.1)
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

    def _hear(self, timeout_s: float) -> None:
        """What the guards say."""
        for rank, message in self.callers.hear(timeout_s):
            now = time.monotonic()
            if message["type"] == "hello":
                self.first_s = min(self.first_s, now)
                if self.signals:
                    rank.send(type="signal", number=self.signals[0])
            elif message["type"] == "signal" and not self.signals:  # to another host's front
                self.signals.append(int(message["number"]))
            elif message is GONE and rank.code is None:
                rank.lose("its guard is gone: the host, or the guard, was ended", now)
                rank.ended_by_us = now > self.end_by

    def _pass_on(self, number: int) -> None:
        """A signal, to every rank. The second Ctrl-C is meant by force."""
        self._hear(timeout_s=0)  # whoever has come meanwhile
        if not any(rank.is_own for rank in self.ranks):  # whoever comes finds nobody, and ends
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
        is_late = now > self.first_s + START_S and not self.signals
        for number in self._missing() if is_late else ():
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
        if all(rank.is_judged for rank in self._running()):  # by who knows those they wait for
            return
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
                rank.send(type="kill", verdict=self._verdict())
                rank.ended_by_us = True

    def _leave(self, now: float, failed: bool) -> None:
        """Of launcher and ranks, who is left without the other follows it after a while."""
        own = [rank for rank in self.ranks if rank.is_own]
        running = [rank for rank in self._running() if rank.is_own]
        waiting = bool(running) if has_ended(self.launcher) else bool(own) and not running
        if not waiting and not has_ended(self.launcher):
            self.leave_by = float("inf")
        elif self.leave_by == float("inf"):
            self.leave_by = now + LEAVE_S
        if now <= self.leave_by:
            return
        if not running and (failed or self.signals or not self._missing()):
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

    def _verdict(self) -> dict[str, object] | None:
        """What the fronts of other hosts are to say."""
        if failed := self._failed():
            first = first_of(failed)
            return asdict(Verdict(first.exit_code or 1, self._went_first(first)))
        return asdict(Verdict(0, self._stopped(), stopped=True)) if self.signals else None

    def _outcome(self) -> Outcome:
        code = self._end_launcher()
        code = 128 - code if code < 0 else code
        for rank in self.ranks:  # those that have ended may still wait for this
            if not rank.is_own:
                rank.send(type="kill", verdict=self._verdict())
        own = [rank for rank in self.ranks if rank.is_own]
        verdicts = [rank.verdict for rank in own if rank.verdict]
        failed, codes = self._failed(), [rank.exit_code for rank in own]
        if verdicts and not self.signals:
            said = verdicts[0]
            code = said.code or max(codes)
            return Outcome(code, said.sentence, stopped=said.stopped)
        if failed:
            first = first_of(failed)
            # where each host is started by itself, who has lost one waits for it at the next start
            lost = lost_hosts([rank for rank in failed if rank.is_own])
            code = first.exit_code or 1  # launchers make 1 of every code, or that of one they ended
            return Outcome(code, self._went_first(first), lost, bool(self.signals))
        if self.signals:
            # what was not there yet was ended by force
            code = max(codes, default=128 + self.signals[0])
            return Outcome(code, self._stopped(), stopped=True)
        if self.abandoned:
            code, why = code or 1, "somebody has ended the launcher"
            return Outcome(
                code, f"{why}; the ranks have stopped and saved, `--resume auto` goes on"
            )
        if codes and not self._missing() and len(codes) >= self.expected.count:
            code = 0  # all that was to be done is done, however the launcher has left
        return Outcome(code, f"the launcher ended with exit code {code}; see its output above")

    def _went_first(self, rank: Rank) -> str:
        return (
            f"rank {rank.number} on {rank.host} went first: {rank.reason}; "
            f"its output is in {self.expected.logs}/rank-{rank.number}.log"
        )

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
