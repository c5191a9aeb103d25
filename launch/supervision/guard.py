"""The guard of one rank: starts it, logs it, hands signals on, and ends it with the job.

It takes the rank's place under the launcher, and imports nothing heavy. The rank is its child, in a
session of its own, so that its loader processes go with it. Whatever ends the guard ends the rank;
when the front is gone, the guard asks the rank to stop, and then ends it: nothing is orphaned on
any host, and no process of another job is ever touched.

Where each host is started by itself, it obeys host 0's front as well (`FIRST`), and tells its own
what that one has decided.
"""

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...recipes import heartbeat
from .lifeline import (
    BEAT_S,
    COLLECT_S,
    FIRST,
    FRONT,
    GIVE_UP_S,
    JOB,
    LOGS,
    LOST_S,
    STOP_S,
    Lines,
    Verdict,
)
from .output import Output, reason
from .processes import has_ended, kill_group, state

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # to stop: by a scheduler, say
TICK_S = 0.05
TELL_S = 60.0  # without host 0's front
GRACE_S = 5.0  # for the verdict's way here
_PR_SET_PDEATHSIG = 1


class Guard:
    """One rank and its connection to the front."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]):
        self.rank = int(environment.get("RANK", "0"))
        self.front = self._call(environment[FRONT])
        self.first: Lines | None = None  # host 0's front, when it has heard us
        self._first_address = environment.get(FIRST, "")
        self.verdict: Verdict | None = None  # its
        self.output = Output(Path(environment[LOGS]), self.rank)
        rank_environment = {k: v for k, v in environment.items() if k not in (FRONT, FIRST, LOGS)}
        self.heartbeat = heartbeat.create()
        rank_environment[heartbeat.HEARTBEAT] = str(self.heartbeat)
        # so that the front finds what a killed guard leaves here
        rank_environment[JOB] = environment[FRONT].rpartition(":")[2]
        self._stopped_at_start = self._asked = self._has_ended = False
        for number in SIGNALS:  # before there is a rank: none may slip through
            signal.signal(number, self._on_signal)
        self.child = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=rank_environment,
            start_new_session=True,
            pass_fds=[self.heartbeat],
            preexec_fn=functools.partial(_die_with_parent, os.getpid()),
        )
        self._started_s = time.monotonic()
        self._sending = threading.Lock()
        self._end_at: float | None = None

    def run(self) -> int:
        """Waits for the rank's end; returns its exit code."""
        copies = [
            threading.Thread(target=self.output.copy, args=(source, to), daemon=True)
            for source, to in ((self.child.stdout, 1), (self.child.stderr, 2))
        ]
        listeners = [threading.Thread(target=self._listen, daemon=True)]
        if self._first_address:
            listeners.append(threading.Thread(target=self._listen_to_first, daemon=True))
        for thread in (*copies, *listeners):
            thread.start()
        beat = time.monotonic()
        while not has_ended(self.child):
            now = time.monotonic()
            if self._end_at and now > self._end_at:
                kill_group(self.child)
            if now > beat:
                self._send(type="beat", **self._place(now))
                beat = now + BEAT_S
            time.sleep(TICK_S)
        kill_group(self.child)  # loader processes that it has left
        code = self.child.wait()
        for thread in copies:  # what was in the pipes
            thread.join(timeout=5)
        why = reason(code, self.output.last_lines)
        if self._stopped_at_start and code in (*(-number for number in ASKED), 130):
            code, why = 0, "stopped before it had begun"
        self._has_ended = True
        exit_ = {"type": "exit", "code": code, "reason": why, "verdict": None}
        if self.first:
            self._send_to(self.first, **exit_)
            self._await_verdict(code)
        exit_["verdict"] = asdict(self.verdict) if self.verdict else None
        self._send_to(self.front, **exit_)
        return 128 - code if code < 0 else int(code)

    def _await_verdict(self, code: int) -> None:
        """Of a failure, the first front says in a while who began; until then we seem to run on."""
        deadline = time.monotonic() + COLLECT_S + GRACE_S
        beat = 0.0
        while code and not (self.verdict or self._asked) and time.monotonic() < deadline:
            if time.monotonic() > beat:
                self._send_to(self.front, type="beat", **self._place(time.monotonic()))
                beat = time.monotonic() + BEAT_S
            time.sleep(TICK_S)

    def _on_signal(self, number: int, _: Any) -> None:
        """From the launcher, which gives its ranks half a minute."""
        if hasattr(self, "child"):
            self._signal(number)
        else:
            os._exit(128 + number)

    def _call(self, front: str) -> Lines:
        host, port, token = front.rsplit(":", 2)
        lines = Lines(socket.create_connection((host, int(port)), timeout=LOST_S))
        me = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        lines.send(type="hello", token=token, **me)
        return lines

    def _listen(self) -> None:
        """Does what the front says, until it is gone."""
        with contextlib.suppress(OSError):
            while True:
                for message in self.front.receive():
                    if message["type"] == "signal":
                        self._asked = True
                        if self.first:
                            self._send_to(self.first, **message)
                    self._obey(message)
        self._give_up()

    def _listen_to_first(self) -> None:
        """Does what host 0's front says, as soon as there is one."""
        self.first, messages = self._find_first()
        with contextlib.suppress(OSError):
            while True:
                for message in messages:
                    self._obey_first(message)
                messages = self.first.receive()
        if self._has_ended:  # it may have, too: all ranks have ended
            return
        where = self._first_address.rpartition(":")[0]
        gone = Verdict(1, f"the command on host 0 ({where}) is gone, and its ranks with it")
        self.verdict = self.verdict or gone
        self._give_up()

    def _obey_first(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "signal":
            if self._asked:  # by our own front, with the same
                return
            name = signal.Signals(int(message["number"])).name
            self.verdict = Verdict(0, f"stopped by {name} to another host", True)
        elif message["type"] == "kill" and message["verdict"]:
            self.verdict = Verdict(**message["verdict"])
        self._obey(message)

    def _find_first(self) -> tuple[Lines, list[dict[str, Any]]]:
        """The connection, and what it says first. It may come later than we."""
        tell = time.monotonic() + TELL_S
        while True:
            with contextlib.suppress(OSError):
                lines = self._call(self._first_address)
                return lines, lines.receive()
            if time.monotonic() > tell:
                tell = float("inf")
                where = self._first_address.rpartition(":")[0]
                print(
                    f"convnext-yolo: rank {self.rank}: the command on host 0 is not to be reached "
                    f"at {where}; until it is, this host's ranks are supervised alone",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(1)

    def _obey(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "signal":
            self._signal(int(message["number"]))
            self._end_by(STOP_S)
        elif message["type"] == "stacks":
            self._show_stacks()
        elif message["type"] == "kill":
            self._end_by(0)

    def _give_up(self) -> None:
        self._signal(signal.SIGTERM)
        self._end_by(GIVE_UP_S)

    def _place(self, now: float) -> dict[str, Any]:
        """Where the rank is, with the age of that: hosts have clocks of their own."""
        beat = heartbeat.read(self.heartbeat) or heartbeat.Beat(since_s=self._started_s)
        fields = asdict(beat)
        for_s = now - fields.pop("since_s")
        judged = self.first is not None
        return {**fields, "for_s": for_s, "state": state(self.child.pid), "judged": judged}

    def _show_stacks(self) -> None:
        if heartbeat.read(self.heartbeat):  # before its first beat, a signal would end it
            self._signal(heartbeat.SHOW_STACKS)

    def _end_by(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._end_at = min(self._end_at or deadline, deadline)

    def _signal(self, number: int) -> None:
        # A rank that only imports, or meets the others, ends by it, with nothing to save: a
        # scheduler is to take that for what it asked for, not for a failure.
        if number in ASKED:
            beat = heartbeat.read(self.heartbeat)
            self._stopped_at_start |= beat is None or beat.doing == heartbeat.START
        if self.child.returncode is None:  # nobody has waited for it: the number is still its own
            os.kill(self.child.pid, number)

    def _send(self, **message: Any) -> None:
        """To the front, or to both."""
        for front in filter(None, (self.front, self.first)):
            self._send_to(front, **message)

    def _send_to(self, front: Lines, **message: Any) -> None:
        # `_listen` finds a broken connection as well, and acts
        with contextlib.suppress(OSError), self._sending:
            front.send(**message)


def main(arguments: Sequence[str]) -> int:
    """Runs `convnext-yolo ARGUMENTS…` as a guarded rank; returns its exit code."""
    return guard_command([sys.executable, "-u", "-m", "convnext_yolo.launch", *arguments])


def guard_command(words: Sequence[str]) -> int:
    """Runs a command as a guarded rank; returns its exit code."""
    try:
        guard = Guard(words, os.environ)
    except OSError as error:
        print(f"convnext-yolo: the front process of this job is gone ({error})", file=sys.stderr)
        return 1
    return guard.run()


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died meanwhile
        os._exit(1)
