"""Run by test_preemption.py on some ranks: a training that gets SIGTERM while it evaluates.

    python ranks_stopped_evaluating.py WHERE RANK RECIPE [OPTION …]

WHERE is `batch`, in the midst of the first evaluation's batches, or `metrics`, when all is
predicted and the main rank computes, for ever.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from convnext_yolo.launch.cli import main
from convnext_yolo.recipes import evaluate


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def at_the_third_call(call: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            ask_to_stop()
        return call(*arguments, **options)

    return counted


def asks_first(call: Callable[..., Any]) -> Callable[..., Any]:
    def asked(*arguments: Any) -> Any:
        ask_to_stop()
        return call(*arguments)

    return asked


def for_ever(*_: Any) -> None:
    threading.Event().wait()


if __name__ == "__main__":
    where, rank, recipe, *options = sys.argv[1:]
    module: Any = evaluate
    if os.environ["RANK"] == rank and where == "batch":
        module._forward = at_the_third_call(module._forward)
    elif where == "metrics":
        module.coco_metrics = for_ever
        if os.environ["RANK"] == rank:
            for name in ("_unless_stopped", "_wait_for_main"):
                setattr(module, name, asks_first(getattr(module, name)))
    sys.exit(main(["train", "--config", recipe, *options]))
