"""The guard of one rank: starts it, logs it, hands signals on, and ends it with the job.

It takes the rank's place under the launcher, and imports nothing heavy. The rank is its child, in a
session of its own, so that its loader processes go with it. Whatever ends the guard ends the rank;
when the front is gone, the guard asks the rank to stop, and then ends it: nothing is orphaned on
any host, and no process of another job is ever touched.
"""

import collections
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ...recipes import heartbeat
from .lifeline import BEAT_S, FRONT, GIVE_UP_S, JOB, LOGS, LOST_S, STOP_S, Lines
from .processes import has_ended, kill_group, state

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b|: error: ")


class Guard:
    """One rank and its connection to the front."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]):
        self.rank = int(environment.get("RANK", "0"))
        self.last_lines: collections.deque[str] = collections.deque(maxlen=200)
        host, port, token = environment[FRONT].rsplit(":", 2)
        self.front = Lines(socket.create_connection((host, int(port)), timeout=LOST_S))
        me = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        self.front.send(type="hello", token=token, **me)
        self.log, self._log_failed = _open_log(Path(environment[LOGS]), self.rank), False
        rank_environment = {k: v for k, v in environment.items() if k not in (FRONT, LOGS)}
        self.heartbeat = heartbeat.create()
        rank_environment[heartbeat.HEARTBEAT] = str(self.heartbeat)
        rank_environment[JOB] = token  # so that the front finds what a killed guard leaves here
        self._stopped_at_start = False
        for number in SIGNALS:  # before there is a rank: none may slip through
            signal.signal(number, self._on_signal)
        self.child = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=rank_environment,
            start_new_session=True,
            pass_fds=[self.heartbeat],
            preexec_fn=_die_with_parent,
        )
        self._started_s = time.monotonic()
        self._sending = threading.Lock()
        self._end_at: float | None = None

    def run(self) -> int:
        """Waits for the rank's end; returns its exit code."""
        copies = [
            threading.Thread(target=self._copy, args=(source, to), daemon=True)
            for source, to in ((self.child.stdout, 1), (self.child.stderr, 2))
        ]
        for thread in (*copies, threading.Thread(target=self._listen, daemon=True)):
            thread.start()
        beat = time.monotonic()
        while not has_ended(self.child):
            now = time.monotonic()
            if self._end_at and now > self._end_at:
                kill_group(self.child)
            if now > beat:
                self._send(type="beat", **self._place(now))
                beat = now + BEAT_S
            time.sleep(0.05)
        kill_group(self.child)  # loader processes that it has left
        code = self.child.wait()
        for thread in copies:  # what was in the pipes
            thread.join(timeout=5)
        why = reason(code, self.last_lines)
        if self._stopped_at_start and code in (-signal.SIGTERM, -signal.SIGUSR1, 130):
            code, why = 0, "stopped before it had begun"
        self._send(type="exit", code=code, reason=why)
        return 128 - code if code < 0 else int(code)

    def _on_signal(self, number: int, _: Any) -> None:
        """From the launcher, which gives its ranks half a minute."""
        if hasattr(self, "child"):
            self._signal(number)
        else:
            os._exit(128 + number)

    def _listen(self) -> None:
        """Does what the front says, until it is gone."""
        self.front.connection.settimeout(LOST_S)
        try:
            while True:
                for message in self.front.receive():
                    if message["type"] == "signal":
                        self._signal(int(message["number"]))
                        self._end_by(STOP_S)
                    elif message["type"] == "stacks":
                        self._show_stacks()
                    elif message["type"] == "kill":
                        self._end_by(0)
        except OSError:
            self._signal(signal.SIGTERM)
            self._end_by(GIVE_UP_S)

    def _place(self, now: float) -> dict[str, Any]:
        """Where the rank is, with the age of that: hosts have clocks of their own."""
        beat = heartbeat.read(self.heartbeat) or heartbeat.Beat(since_s=self._started_s)
        fields = asdict(beat)
        for_s = now - fields.pop("since_s")
        return {**fields, "for_s": for_s, "state": state(self.child.pid)}

    def _show_stacks(self) -> None:
        if heartbeat.read(self.heartbeat):  # before its first beat, a signal would end it
            self._signal(heartbeat.SHOW_STACKS)

    def _end_by(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._end_at = min(self._end_at or deadline, deadline)

    def _signal(self, number: int) -> None:
        # A rank that only imports, or meets the others, ends by it, with nothing to save: a
        # scheduler is to take that for what it asked for, not for a failure.
        if number in (signal.SIGTERM, signal.SIGUSR1):
            beat = heartbeat.read(self.heartbeat)
            self._stopped_at_start |= beat is None or beat.doing == heartbeat.START
        if self.child.returncode is None:  # nobody has waited for it: the number is still its own
            os.kill(self.child.pid, number)

    def _send(self, **message: Any) -> None:
        # `_listen` finds a broken connection as well, and acts
        with contextlib.suppress(OSError), self._sending:
            self.front.send(**message)

    def _keep(self, data: bytes) -> None:
        """In the log, as far as its disk takes it: the rank is not to wait for that."""
        try:
            self.log.write(data)
        except OSError as error:
            if not self._log_failed:
                self._log_failed = True
                print(f"{self.log.name}: can't be written ({error.strerror})", file=sys.stderr)

    def _copy(self, source: IO[bytes], to: int) -> None:
        """The rank's output, to the launcher and into the log."""
        line = b""
        while data := os.read(source.fileno(), 65536):
            self._keep(data)
            with contextlib.suppress(OSError):  # where nobody reads it any more, the log goes on
                os.write(to, data)
            *lines, line = (line + data).split(b"\n")
            self.last_lines.extend(one.decode(errors="replace") for one in lines)
        if line:
            self.last_lines.append(line.decode(errors="replace"))


def reason(code: int, lines: Sequence[str]) -> str:
    """Why a rank ended, in a few words: its signal, or the error that it printed last."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (by hand, or for want of memory)" if code == -9 else "")
    if code == 0:
        return "ended"
    said = [re.sub(r"^\[rank\d+\]: ?", "", line).strip() for line in lines]
    errors = [line for line in said if _ERROR.search(line)]
    last = (errors or [line for line in said if line] or ["it said nothing"])[-1]
    return f"exit code {code}: {last[:300]}"


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


def _open_log(folder: Path, rank: int) -> IO[bytes]:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / f"rank-{rank}.log").open("ab", buffering=0)
        log.write(f"--- {started} rank {rank} on {socket.gethostname()}\n".encode())
    except OSError as error:
        print(f"{folder}: no log of rank {rank} can be written ({error})", file=sys.stderr)
        return open(os.devnull, "ab", buffering=0)
    return log


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
