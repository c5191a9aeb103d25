"""Slurm: a job script that starts a rank per task, and puts itself back into the queue.

Slurm is the launcher: `srun` starts every rank, under our supervision (`allocation.py`), and a rank
learns who it is from Slurm's own variables. On a warning before the time limit, and on preemption,
the ranks publish a checkpoint; the script then asks whether the run is finished, and requeues the
job if not.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .command import Command, File
from .job import Job, LaunchError, describe_job, given_environment
from .supervision.stall import LIMIT_S

TEMPLATE = Path(__file__).parent / "templates" / "slurm.sbatch"
MARK = "# From here on there is nothing to change."


@dataclass(frozen=True)
class Allocation:
    """What is asked of Slurm."""

    nodes: int = 1
    processes: int = 1  # of each node
    gpus: int | None = None  # of each node; None: one for each process
    cpus: int | None = None  # of each process; None: itself and its loader processes
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    warning_s: int = 120  # before the time limit
    stall_s: int = LIMIT_S  # without progress, then the job is ended; 0: never
    asks_doctor: bool = True  # on the job's hosts, whenever it starts
    more: tuple[str, ...] = ()  # further options, as sbatch takes them
    env: tuple[str, ...] = ()


def slurm(
    configs: Sequence[str], resume: str, options: Sequence[str], allocation: Allocation
) -> Command:
    """The submission, with the job script and the recipe as it is now.

    The job may wait for hours and start several times: it does not read the recipe's own files.

    Raises:
        LaunchError, RecipeError: a mistake, in one sentence.
    """
    # A code other than 0 would make srun kill ranks that are just leaving.
    options = [*options, "--checkpoint.stop_exit_code", "0"]
    count, each = allocation.nodes, allocation.processes
    what = f"--nodes {count} --processes-per-node {each}"
    job = describe_job(configs, resume, options, [each] * count, what)
    job, recipe = job.frozen()
    # sbatch hands the whole environment on; the script adds what is to be otherwise.
    job = replace(job, environment=given_environment(allocation.env, os.environ))
    file = File(job.folder / "job.sbatch", job_script(job, allocation))
    return Command(["sbatch", str(file.path)], {}, (recipe, file))


def job_script(job: Job, allocation: Allocation) -> str:
    """The text of the job script: a head for this job, and the template's body."""
    body = TEMPLATE.read_text(encoding="utf-8").partition(MARK)
    head = ["#!/bin/bash", *(f"#SBATCH {line}" for line in _directives(job, allocation))]
    head += [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    config = shlex.join(word for name in job.configs for word in ("--config", name))
    head += [
        f"python={shlex.quote(sys.executable)}",
        f"recipe=({config})",
        f"resume={shlex.quote(job.resume)}",
        f"doctor={'yes' if allocation.asks_doctor else 'no'}",
        f"stall_s={allocation.stall_s}",
    ]
    return "\n".join([*head, "", "".join(body[1:])])


def _directives(job: Job, allocation: Allocation) -> list[str]:
    recipe, folder = job.recipe, str(job.folder).replace("%", "%%")
    cpus = allocation.cpus or recipe.data.workers + 1
    gpus = allocation.processes if allocation.gpus is None else allocation.gpus
    name = re.sub(r"[^\w.-]", "-", Path(recipe.run).name)
    lines = [
        f"--job-name={name}",
        f"--nodes={allocation.nodes}",
        f"--ntasks-per-node={allocation.processes}",
        f"--cpus-per-task={cpus}",
    ]
    lines += [f"--gpus-per-node={gpus}"] if gpus else []
    limit_s = allocation.time and _seconds(allocation.time)
    if limit_s and allocation.warning_s >= limit_s:
        raise LaunchError(
            f"--warning-s {allocation.warning_s}: is not shorter than --time {allocation.time}, "
            "so that every start would only stop again; give a longer time, or a later warning"
        )
    for option in ("time", "partition", "account"):
        value = getattr(allocation, option)
        lines += [f"--{option}={_quoted(value)}"] if value else []
    lines += [
        "--requeue",
        f"--signal=USR1@{allocation.warning_s}",
        "--open-mode=append",
        f"--chdir={_quoted(str(Path.cwd()))}",
        f"--output={_quoted(folder + '/slurm-%j.log')}",
        *map(_quoted_option, allocation.more),
    ]
    for line in lines:
        if "\n" in line or not line.startswith("-"):
            raise LaunchError(
                f"--sbatch {line!r}: is not an option of sbatch, as --constraint=a100"
            )
    return lines


def _seconds(time: str) -> int:
    """A time limit as sbatch takes it: MIN, MIN:S, H:MIN:S, D-H, D-H:MIN, D-H:MIN:S; 0 is none."""
    if time.lower() in ("infinite", "unlimited"):
        return 0
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not found:
        raise LaunchError(f"--time {time!r}: is no time limit; give it as 24:00:00 or 1-12")
    days, *rest = (int(part or 0) for part in found.groups())
    if found[1] is None and found[4] is None:  # without days or hours they are minutes
        rest = [0, *rest[:2]]
    hours, minutes, seconds = rest
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _quoted_option(option: str) -> str:
    """`--name=value` with its value between quotes, where it needs them and has none."""
    name, equals, value = option.partition("=")
    return option if '"' in value or "'" in value else name + equals + _quoted(value)


def _quoted(value: str) -> str:
    """sbatch reads quotes as a shell does, but for the escapes within."""
    if '"' in value or "\n" in value:
        raise LaunchError(f"{value!r}: sbatch can't be told this; use something without quotes")
    return f'"{value}"' if re.search(r"[^\w@+=:,./%-]", value) else value
