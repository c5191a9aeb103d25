"""The demo's server in a process of its own, watched from inside.

    python serve_watched.py WEIGHTS PORT PASSES OUTSIDE

Appends a line to PASSES for each pass through the network, and one to OUTSIDE for each attempt to
reach anything but loopback. A picture of 13 × 13 px makes the model fail.
"""

import sys
from pathlib import Path
from typing import Any


def watch_connections(outside: Path) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        host: Any = None
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[-1], tuple):
            host = arguments[-1][0]
        if isinstance(host, bytes):
            host = host.decode()
        if host is not None and host not in ("127.0.0.1", "localhost", "::1"):
            with outside.open("a") as file:
                file.write(f"{event} {host}\n")

    sys.addaudithook(hook)


def watch_passes(passes: Path) -> None:
    from convnext_yolo.model.predictor import Predictor

    candidates = Predictor.candidates

    def counted(self: Predictor, pictures: Any, *rest: Any, **named: Any) -> Any:
        if pictures[0].shape[:2] == (13, 13):
            raise RuntimeError("no kernel image is available\nwith much more to say")
        with passes.open("a") as file:
            file.write(f"{pictures[0].shape}\n")
        return candidates(self, pictures, *rest, **named)

    Predictor.candidates = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    weights, port, passes, outside = sys.argv[1:]
    watch_connections(Path(outside))
    watch_passes(Path(passes))

    from convnext_yolo.demo.app import serve

    serve(Path(weights), int(port))
