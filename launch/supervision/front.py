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

from ..addresses import own_address
from ..command import Command, Ranks
from ..job import LaunchError
from .lifeline import BEAT_S, FRONT, LOGS, LOST_S, STOP_S, Lines
from .processes import any_marked, has_ended, kill_group, kill_marked
from .rank import Outcome, Rank, first_of
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
        address = _address(expected.callers)
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
        rank, lines = key.data
        now = time.monotonic()
        try:
            for message in lines.receive():
                rank.take(message, now)
        except (OSError, KeyError, TypeError, ValueError):
            self.selector.unregister(key.fileobj)
            if rank.code is None:
                rank.lose("its guard is gone: the host, or the guard, was ended", now)

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(2)
        try:
            lines = Lines(connection)
            [hello] = lines.receive()
            if not hmac.compare_digest(str(hello["token"]), self.token):
                raise ConnectionError("not one of ours")
            number = int(hello["rank"])
        except (OSError, KeyError, ValueError):
            connection.close()
            return
        host = self.expected.hosts.get(number, str(hello["host"]))
        rank = Rank(number, host, lines, time.monotonic())
        rank.place.since_s = rank.heard_s
        self.first_s = min(self.first_s, rank.heard_s)
        self.ranks.append(rank)
        self.selector.register(connection, selectors.EVENT_READ, (rank, lines))
        if self.signals:
            rank.send(type="signal", number=self.signals[0])

    def _pass_on(self, number: int) -> None:
        """A signal, to every rank. The second Ctrl-C is meant by force."""
        for key, _ in self.selector.select(timeout=0):  # whoever has come meanwhile
            self._hear(key)
        if not self.ranks:  # nobody is there yet; whoever comes finds nobody, and ends
            kill_group(self.launcher)
        now = time.monotonic()
        if number == signal.SIGINT and self.signals.count(signal.SIGINT) > 1:
            self.end_by = min(self.end_by, now)
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
                rank.lose(f"no sign of life for {silent_s:.0f} s", now)
            elif ending:
                rank.send(type="kill")

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
        return [rank for rank in self.ranks if rank.lost or (rank.code and not self.signals)]

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
            lost = frozenset(rank.host for rank in failed if rank.lost)
            return Outcome(code, sentence, lost, bool(self.signals))
        if self.signals:
            # launchers make 1 of every code, and what was not there yet was ended by force
            code = max(codes, key=abs) if codes else -self.signals[0]
            code = 128 - code if code < 0 else code
            return Outcome(code, f"stopped by {signal.Signals(self.signals[0]).name}", stopped=True)
        if self.abandoned:
            code, why = code or 1, "somebody has ended the launcher"
            return Outcome(
                code, f"{why}; the ranks have stopped and saved, `--resume auto` goes on"
            )
        if codes and not self._missing() and len(codes) >= self.expected.count:
            code = 0  # all that was to be done is done, however the launcher has left
        return Outcome(code, f"the launcher ended with exit code {code}; see its output above")


def _address(callers: tuple[str, ...]) -> str:
    """The address of this machine by which those hosts can call it."""
    found = []
    for host in callers:
        try:
            found.append(own_address(host.rpartition("@")[2]))
        except OSError:
            continue  # a name that only ssh knows
    far = [address for address in found if not address.startswith("127.") and address != "::1"]
    if far or found:
        return (far or found)[0]
    raise LaunchError(
        f"{', '.join(callers)}: none of these hosts can be found from here; give the first one's "
        "address with --master-addr"
    )
