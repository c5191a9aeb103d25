"""The Slurm job that this process runs in: its hosts, and how a process is started on one."""

import os
import re
import subprocess

from .job import LaunchError


def job_hosts() -> dict[str, int]:
    """The job's hosts, the first one first, and the tasks of each.

    Raises:
        LaunchError: this is no Slurm job, or Slurm does not answer.
    """
    try:
        nodes, tasks = os.environ["SLURM_JOB_NODELIST"], os.environ["SLURM_TASKS_PER_NODE"]
    except KeyError as error:
        raise LaunchError(
            f"{error.args[0]} is not set: this is no Slurm job; run it in one that sbatch has begun"
        ) from None
    words = ["scontrol", "show", "hostnames", nodes]
    try:
        names = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise LaunchError(f"scontrol does not tell the hosts of {nodes} ({error})", 1) from None
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):  # 8(x2),4
        counts += [int(count)] * int(times or 1)
    return dict(zip(names, counts, strict=True))


def srun_words(host: str, command: list[str]) -> list[str]:
    """A command on one host of the job, whose lines come and go at once."""
    one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={host}"]
    # ALL: a job that sbatch was to give no environment would hand its own on to nobody.
    return ["srun", "--overlap", "--export=ALL", *one, "--unbuffered", "--quiet", *command]
