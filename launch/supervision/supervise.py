"""Runs a job to its end, under supervision (`front.py`), and again if it failed.

We return when none of its processes is left, on any host.
"""

import os
import sys
from collections.abc import Callable

from ...recipes.config import RecipeError
from ..command import Command
from ..job import LaunchError
from .front import Front
from .processes import start, write_files
from .rank import Outcome
from .stall import LIMIT_S


def run(
    render: Callable[[frozenset[str]], Command],
    dry_run: bool = False,
    max_restarts: int = 0,
    stall_s: float = LIMIT_S,
) -> None:
    """Runs what is rendered to its end, or only prints it.

    Args:
        render: makes the command, without those hosts; called again for each restart.
        dry_run: print it as a shell script instead.
        max_restarts: how often a job that failed is started again, without the hosts that were
            lost. The recipe's own mistakes and signals end it.
        stall_s: a job whose ranks have not got on for so long has failed; 0: never.

    Raises:
        LaunchError: the job failed; says who went first, carries the exit code.
    """
    command = render(frozenset())
    if dry_run:
        print(command.script(), flush=True)
        return
    lost: frozenset[str] = frozenset()
    for restart in range(max_restarts + 1):
        outcome = run_once(command, stall_s)
        if not outcome.code:
            return
        if restart == max_restarts or outcome.stopped or outcome.code == 2:
            break
        lost |= outcome.lost_hosts
        print(f"{outcome.sentence}; restart {restart + 1} of {max_restarts}", file=sys.stderr)
        try:
            command = render(lost)
        except (LaunchError, RecipeError) as error:  # fewer hosts may not share the batch
            again = f"{outcome.sentence}; it can't be started again: {error}"
            raise LaunchError(again, outcome.code) from None
    raise LaunchError(outcome.sentence, outcome.code)


def run_once(command: Command, stall_s: float) -> Outcome:
    """Runs a command to its end, under supervision if it says which ranks it starts."""
    if command.ranks:
        with Front(command, command.ranks, stall_s) as front:
            return front.run()
    write_files(command)
    print(f"$ {command}", flush=True)
    code = start(command, env={**os.environ, **command.environment}).wait()
    return Outcome(code, f"{command.words[0]} ended with exit code {code}; see its output above")
