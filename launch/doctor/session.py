"""A probe on a host: started through ssh or here, asked and answered in lines of JSON.

A question goes to all probes before the first answer is waited for, so that hosts work side by
side. A probe ends when its standard input does, hence with the process that asks.
"""

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .facts import PROTOCOL

MARK = "convnext-yolo-probe "  # before each of our lines: login shells print what they like
MODULE = "convnext_yolo.launch.doctor.probe"
CONNECT_S = 5  # of ssh
START_S = 30.0  # of ssh, Python and the package, from a file system that may be slow


class ProbeError(Exception):
    """A probe that does not answer. The text is what it said last.

    Args:
        said: its standard error, or why it was given up.
        code: its exit code; None while it runs.
    """

    def __init__(self, said: str, code: int | None = None):
        super().__init__(said)
        self.said, self.code = said, code


class Session(Protocol):
    """Somebody on a host who answers questions."""

    def send(self, question: str, **details: Any) -> None:
        """Asks; does not wait."""
        ...

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The answer. Raises ProbeError where none comes in time."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


def ssh_words(
    host: str, python: str, ssh_port: int | None, environment: Mapping[str, str]
) -> list[str]:
    """The command that starts a probe on a host: nobody is there to answer ssh's questions."""
    words = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"]
    words += ["-p", str(ssh_port)] if ssh_port else []
    settings = [f"{name}={value}" for name, value in environment.items()]
    remote = [*(["env", *settings] if settings else []), python, "-m", MODULE]
    return [*words, "--", host, shlex.join(remote)]


class ProbeSession:
    """A probe in a process.

    Args:
        words: the command that starts it; by default a probe on this machine.
    """

    def __init__(self, words: Sequence[str] | None = None):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            words or [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # a Ctrl-C is ours to answer
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed meanwhile
            for line in self.process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def send(self, question: str, **details: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"ask": question, **details}) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: `receive` tells why

    def receive(self, timeout_s: float) -> dict[str, Any]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                item = self._lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                raise ProbeError(f"no answer within {timeout_s:g} s") from None
            if item is None:
                self._lines.put(None)  # for who asks again
                raise ProbeError(self._last_words(), self.process.wait(5))
            if item.startswith(MARK):
                answer = json.loads(item.removeprefix(MARK))
                if "failed" in answer:
                    raise ProbeError(str(answer["failed"]), 0)
                return dict(answer)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        # Between asterisks stand ssh's own warnings, about ciphers.
        said = [line.strip() for line in lines if line.strip() and not line.startswith("**")]
        return said[-1] if said else "it ended without a word"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._errors.close()


def greet(session: Session, timeout_s: float = START_S) -> dict[str, Any]:
    """Waits until a probe is there.

    Raises:
        ProbeError: it is not, or speaks another version of the protocol.
    """
    hello = session.receive(timeout_s)
    if hello.get("protocol") != PROTOCOL:
        raise ProbeError(f"another version of the package: its probe is {hello.get('protocol')}", 0)
    return hello
