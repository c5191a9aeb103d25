"""The command line's front: parse, run, and turn a user's mistake into one sentence."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from .commands import build_parser

ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# For the main rank to tell a mistake, and its launcher, or our supervision, to end the others.
MAIN_RANK_S = 12.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    options, rest = build_parser().parse_known_args(arguments)
    parser: argparse.ArgumentParser = options.parser
    if rest and not options.takes_recipe_keys:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    # A plain kill, a terminal that closes, a scheduler's warning: they unwind like Ctrl-C, so that
    # nothing half-written stays. Under nohup, what is ignored stays so. A rank has nothing to
    # unwind until it heeds them itself, and while it meets the others it could not.
    is_rank = "RANK" in os.environ and options.is_run_by_ranks
    ends = () if is_rank else ENDS
    heeded = [n for n in ends if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in heeded}
    try:
        return options.run_command(options) or 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # Every room marks a user's mistake with an exit code; all else is ours, with traceback.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        if not is_rank or getattr(error, "on_one_rank", False) or _is_left_alone():
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return int(code)
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _interrupt:  # else the command has its own reasons
                signal.signal(number, handler)


def _is_left_alone() -> bool:
    """Whether this process is to tell its mistake: no main rank has found the same.

    As a rule all ranks find it. The main one tells it, and ends; then the launcher ends the others.
    One that ends before might have the launcher end the main rank with its sentence unsaid. One
    that is still here after a while has found the mistake alone: a file that only its host lacks.
    """
    if os.environ["RANK"] == "0":
        return True
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # all were asked to stop, and do
        return False
    try:
        time.sleep(MAIN_RANK_S)
    except KeyboardInterrupt:
        return False
    return True


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
