"""What the sub-commands of `launch` have in common: their options, and what they run."""

import argparse
from collections.abc import Callable
from pathlib import Path

from .doctor_commands import ask_about_launch
from .parser import Commands, Parser, add_command, whole_number
from .plan_commands import add_hardware_options, plan_launch
from .recipe_options import RECIPE_KEYS, add_recipe_options
from .supervision.stall import LIMIT_S


def launcher_parser(where: Commands, name: str, text: str, epilog: str = "") -> Parser:
    """The parser of one launcher, with what all of them take."""
    keys = RECIPE_KEYS.format(command=f"launch {name}")
    parser = add_command(where, name, text, f"{epilog}\n{keys}" if epilog else keys)
    add_recipe_options(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="run nothing: print the command and the files that it uses, as a shell script",
    )
    instead.add_argument(
        "--plan",
        action="store_true",
        help="run nothing: print what the recipe costs on so many ranks, as `plan` does",
    )
    add_hardware_options(parser.add_argument_group("with --plan"))
    parser.add_argument(
        "--stall-s",
        type=whole_number,
        default=LIMIT_S,
        metavar="S",
        help=f"end the job when no rank gets on for so long; default {LIMIT_S} s, 0: never",
    )
    return parser


def add_env(parser: Parser) -> None:
    """Adds `--env`, for launchers that do not hand on the environment by themselves."""
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the ranks, as NCCL_SOCKET_IFNAME=eth0; may be given again",
    )


def run_launcher(
    parser: Parser, render: Callable[[argparse.Namespace], object], here: bool = True
) -> None:
    """Makes `parser` run what `render` returns, after the doctor's look at it.

    Args:
        here: the launcher runs the job by itself, so that a failed one can be started again.
    """
    if here:
        without = ", without hosts that were lost" if parser.get_default("lost") is not None else ""
        parser.add_argument(
            "--max-restarts",
            type=whole_number,
            default=0,
            metavar="N",
            help=f"start a job that failed again from its newest checkpoint{without}; default 0",
        )
    parser.add_argument(
        "--no-doctor",
        action="store_true",
        help="start without looking for reasons why it would fail",
    )

    def run(options: argparse.Namespace) -> None:
        if options.plan:
            return plan_launch(options)
        if not (options.dry_run or options.no_doctor):
            render(options)  # what is wrong with the command itself is told at once
            ask_about_launch(options, here)
        from .command import Command
        from .job import LaunchError
        from .supervision.supervise import run

        before: list[set[tuple[str, int]]] = []  # the checkpoints when the first was started

        def command(lost: frozenset[str]) -> Command:
            if lost:
                if not hasattr(options, "lost"):
                    raise LaunchError(f"{', '.join(sorted(lost))} is lost, and there is no other")
                options.lost = lost
            found = _published(options)
            if before and found - before[0]:
                options.resume = "auto"  # else what was named is still where the run is to go on
            before[:] = before or [found]
            rendered = render(options)
            assert isinstance(rendered, Command)
            return rendered

        run(command, options.dry_run, getattr(options, "max_restarts", 0), options.stall_s)

    parser.set_defaults(run_command=run)


def _published(options: argparse.Namespace) -> set[tuple[str, int]]:
    """The checkpoints of the run: a step may be published again, so each with its time."""
    from ..recipes.load import load_recipe, recipe_path

    recipe = load_recipe([recipe_path(name) for name in options.config], options.rest)
    manifests = (Path(recipe.run) / "checkpoints").glob("step-????????/manifest.json")
    return {(path.parent.name, path.stat().st_mtime_ns) for path in manifests}
