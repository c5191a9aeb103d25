"""Being asked to stop: by a signal, or by a launcher that is gone.

A signal only sets a flag: a collective inside a signal handler deadlocks, and the launchers signal
their ranks one after another. The training loop's reduction tells all ranks of it, at the same
step.

The `deepspeed` front process ends on SIGTERM without a word to its per-node launcher, whose ranks
would train on unattended. So ranks watch those above them: where the launcher, or the process that
started it, is gone, that is a signal too.
"""

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LOOK_EVERY_S = 0.5
# What the command lines of per-node launchers have in them. A shell above them may end in peace.
NODE_LAUNCHER = "deepspeed.launcher.launch"
LAUNCHERS = (NODE_LAUNCHER, "torchrun", "torch.distributed.run", "accelerate")


class StopRequest:
    """Whether this process was asked to stop. A context: what was in force before comes back.

    But once it was asked, further signals are ignored to the end of the process, which is near:
    they would make something else of its exit code.

    Args:
        above: `launchers_above()`, of the very start of the process, if that was long ago.
    """

    def __init__(self, above: Mapping[int, int] | None = None) -> None:
        self.asked = False
        self._above = launchers_above() if above is None else above
        self.reason = ""
        self._before: dict[int, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            # Under nohup a terminal may close: what was ignored before stays so.
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._on_signal)
        if self._above:
            threading.Thread(target=self._watch, args=(self._above,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        self.asked, self.reason = True, self.reason or reason

    def _watch(self, parents: Mapping[int, int]) -> None:
        """Looks whether each process still has the parent that it had."""
        while not any(_parent(child) != parent for child, parent in parents.items()):
            if self._over.wait(LOOK_EVERY_S):
                return
        self._ask("the end of its launcher")


def launchers_above() -> dict[int, int]:
    """Processes and their parents: those that only a launcher's death changes.

    To be asked when the process has only just begun: after it has imported and met the others, a
    launcher may be gone already, and what is above then looks as if it had always been there.
    """
    launcher = os.getppid()
    words = _command_line(launcher)
    if not any(name in words for name in LAUNCHERS):
        return {}
    watched = {os.getpid(): launcher}
    front = _parent(launcher)
    if NODE_LAUNCHER in words and front not in (None, 0, 1):
        watched[launcher] = front
    return watched


def _command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _parent(process: int) -> int | None:
    """None where the process is gone, or has ended and waits to be collected."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[1])
