"""The doctor's probe: runs on a host and answers questions, line by line, as JSON.

`python -m convnext_yolo.launch.doctor.probe`, started by `doctor` through ssh. It changes nothing
but a file in the run's folder, which goes again whatever happens, and holds a port only while it
is asked to. Standard output is its own: what libraries print goes to standard error.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from .facts import PROTOCOL
from .session import MARK


class Probe:
    """Answers questions about this host; the answers are those of `facts`."""

    def __init__(self) -> None:
        self.token: Path | None = None
        self.listener: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question. Whatever goes wrong in finding it is an answer as well."""
        questions: dict[str, Callable[..., dict[str, Any]]] = {
            "settle": self.settle,
            "time": self.time,
            "leave_token": self.leave_token,
            "facts": self.facts,
            "recipe": self.recipe,
            "listen": self.listen,
            "connect": self.connect,
            "meet": self.meet,
            "master": self.master,
        }
        details = {name: value for name, value in request.items() if name != "ask"}
        return questions[request["ask"]](**details)

    def settle(self, folder: str, environment: dict[str, str]) -> dict[str, Any]:
        """Goes where ranks are started, with what they are given."""
        os.environ.update(environment)
        try:
            os.chdir(folder)
        except OSError as error:
            return {"error": error.strerror or str(error)}
        return {"error": ""}

    def time(self) -> dict[str, Any]:
        """Says what time it is here."""
        return {"time_s": time.time()}

    def leave_token(self, run: str, name: str) -> dict[str, Any]:
        """Leaves a file that the other hosts look for."""
        from .folders import existing

        token = existing(Path(run)) / name
        try:
            token.write_text(name, encoding="utf-8")
        except OSError as error:
            return {"error": error.strerror or str(error)}
        self.token = token.absolute()
        return {"token": str(self.token)}

    def facts(self, **request: Any) -> dict[str, Any]:
        """Tells everything of this host."""
        from .host import host_facts

        return host_facts(**request).model_dump()

    def recipe(self, **request: Any) -> dict[str, Any]:
        """Tells what follows from the recipe, on whatever host."""
        from .model import recipe_facts

        return recipe_facts(**request).model_dump()

    def listen(self, port: int) -> dict[str, Any]:
        """Takes the port on which the ranks are going to meet."""
        from .meeting import listen

        self.listener, error = listen(port)
        return {"error": error}

    def connect(self, address: str, port: int) -> dict[str, Any]:
        """Calls the first host there."""
        from .meeting import connect

        return {"error": connect(address, port)}

    def meet(self, **request: Any) -> dict[str, Any]:
        """Takes part in an all-reduce with the other hosts."""
        from .meeting import meet

        if self.listener:
            self.listener.close()
            self.listener = None
        return meet(**request).model_dump()

    def master(self, address: str, port: int, is_first: bool) -> dict[str, Any]:
        """Looks at the place where ranks meet that are started by hand."""
        from .meeting import find_busy, find_unknown

        return {"busy": find_busy(port) if is_first else "", "unknown": find_unknown(address)}

    def close(self) -> None:
        """Leaves nothing behind."""
        if self.listener:
            self.listener.close()
        if self.token:
            with contextlib.suppress(OSError):
                self.token.unlink()


def main() -> int:
    """Answers until standard input ends."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm's warning to a job: it is for the ranks
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    probe = Probe()
    requests: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(probe, requests), daemon=True).start()
    _say(own, {"protocol": PROTOCOL})
    while True:
        request = requests.get()
        try:
            _say(own, probe.answer(json.loads(request)))
        except Exception as error:  # it is the other side that can tell somebody
            _say(own, {"failed": f"{type(error).__name__}: {error}"})


def _listen(probe: Probe, requests: "SimpleQueue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    probe.close()
    os._exit(0)  # whatever the main thread is waiting for


def _say(own: IO[str], answer: dict[str, Any]) -> None:
    own.write(f"{MARK}{json.dumps(answer)}\n")
    own.flush()


if __name__ == "__main__":
    sys.exit(main())
