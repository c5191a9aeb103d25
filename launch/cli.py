"""The command line's front: parse, run, and turn a user's mistake into one sentence."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from .commands import build_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    options, rest = build_parser().parse_known_args(arguments)
    parser: argparse.ArgumentParser = options.parser
    if rest and not options.takes_recipe_keys:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    # A plain kill unwinds like Ctrl-C, so that nothing half-written stays.
    before = signal.signal(signal.SIGTERM, _interrupt)
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
        # Many processes find the same mistake, unless it came up in the midst of one's work.
        if os.environ.get("RANK", "0") == "0" or getattr(error, "on_one_rank", False):
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return int(code)
    finally:
        if signal.getsignal(signal.SIGTERM) is _interrupt:  # else the command has its own reasons
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
