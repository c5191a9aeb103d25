"""`python -m convnext_yolo.launch.supervision.allocation --config FILE [--key value] -- srun …`.

Within a Slurm job, on its first host: srun, under the same supervision as other launchers. Exit
code 75 (EX_TEMPFAIL) says that a host was lost: the job may go back into the queue, where Slurm
finds another. A job that has been there before without a checkpoint since has another fault: Slurm
may end all of a host for want of memory, say, and would do so for ever. Nor does one go back that
was stopped twice in a row, at its time limit, say, before it had published anything new.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..parser import Parser, whole_number

LOST_HOST = 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the words after `--` to their end; returns the exit code."""
    parser = Parser("python -m convnext_yolo.launch.supervision.allocation", allow_abbrev=False)
    parser.add_argument("--config", action="append", required=True, metavar="FILE")
    parser.add_argument("--stall-s", type=whole_number, required=True, metavar="S")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--" not in words:
        parser.error("the command to supervise is missing: give -- srun …")
    end = words.index("--")
    options, rest = parser.parse_known_args(words[:end])

    from ...recipes.checkpoint import published
    from ...recipes.config import RecipeError
    from ...recipes.load import load_recipe, recipe_path
    from ...recipes.resume import is_finished
    from ..command import Command, Ranks
    from ..job import LaunchError, logs_folder
    from ..slurm_job import job_hosts
    from .supervise import run_once

    try:
        recipe = load_recipe([recipe_path(name) for name in options.config], rest)
        checkpoints = Path(recipe.run) / "checkpoints"
        before = published(checkpoints)[:1]
        count = int(os.environ.get("SLURM_NTASKS", "0"))
        callers = tuple(reversed(job_hosts()))  # not this one, the first, if there are others
        ranks = Ranks({}, logs_folder(recipe), callers, count)
        outcome = run_once(Command(words[end + 1 :], ranks=ranks), options.stall_s)
    except (RecipeError, LaunchError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    if outcome.code:
        print(f"convnext-yolo: {outcome.sentence}", file=sys.stderr)
    has_published = published(checkpoints)[:1] != before
    is_first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    if outcome.lost_hosts and (has_published or is_first):
        return LOST_HOST
    if outcome.code or is_finished(recipe):
        return outcome.code
    return _stopped(ranks.logs / f"slurm-{os.environ.get('SLURM_JOB_ID', '')}.idle", has_published)


def _stopped(idle: Path, has_published: bool) -> int:
    """The exit code of a start that a signal has ended. `idle` marks one without a checkpoint."""
    if has_published:
        idle.unlink(missing_ok=True)
        return 0
    if not idle.exists():
        idle.touch()
        return 0
    print(
        "convnext-yolo: stopped twice before anything new was published, so the job does not go "
        "back into the queue; give it a longer --time, or a later warning (--warning-s)",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
