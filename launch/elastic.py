"""torchrun, and accelerate which is torchrun underneath: started on each host, by hand or a script.

Both keep ranks in sessions of their own and hand SIGTERM on to them. torchrun's hosts meet by a
c10d rendezvous, which two settings keep from hanging where a host has several addresses or a name
that others can't resolve: which host serves it, and the address that each is reached at.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import yaml

from .addresses import own_address
from .command import Command, File, Ranks, program
from .job import Job, LaunchError, describe_job, given_environment, gpus_here


@dataclass(frozen=True)
class Hosts:
    """What one host is told about all."""

    count: int = 1
    number: int | None = None  # of this host, from 0
    processes: int | None = None  # of each host; None: its GPUs, or 1 on the CPU
    master: str | None = None  # HOST:PORT of host 0
    local_address: str | None = None  # of this host, for the others; None: found out
    env: tuple[str, ...] = ()


def torchrun(
    configs: Sequence[str], resume: str, options: Sequence[str], hosts: Hosts, run_id: str
) -> Command:
    """The torchrun of this host. `run_id` tells jobs apart that meet at one port.

    Raises:
        LaunchError, RecipeError: a mistake, in one sentence.
    """
    job = _job(configs, resume, options, hosts, "--rdzv-endpoint")
    words = [program("torchrun"), "--nnodes", str(hosts.count)]
    words += ["--nproc-per-node", str(job.slots[0])]
    if hosts.count == 1:
        words.append("--standalone")
    else:
        # torchrun would compare names to find out whether it serves the rendezvous, and would
        # give others the host's own name.
        address = hosts.local_address or _own_address(job)
        words += ["--rdzv-backend", "c10d", "--rdzv-id", run_id]
        words += ["--rdzv-endpoint", str(hosts.master)]
        words += ["--rdzv-conf", f"is_host={int(hosts.number == 0)}", "--local-addr", address]
    return Command([*words, "-m", *job.train_words], dict(job.environment), ranks=_mine(job, hosts))


def accelerate(
    configs: Sequence[str], resume: str, options: Sequence[str], hosts: Hosts
) -> Command:
    """The `accelerate launch` of this host, and the configuration file that it reads.

    Raises:
        LaunchError, RecipeError: a mistake, in one sentence.
    """
    job = _job(configs, resume, options, hosts, "--master")
    file = File(job.folder / f"accelerate-{hosts.number or 0}.yaml", _accelerate_yaml(job, hosts))
    words = [program("accelerate"), "launch", "--config_file", str(file.path)]
    return Command(
        [*words, "--module", *job.train_words], dict(job.environment), (file,), _mine(job, hosts)
    )


def _accelerate_yaml(job: Job, hosts: Hosts) -> str:
    """Its DeepSpeed plugin stays off: the engine that the recipe describes is DeepSpeed's own."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        # its name for several processes, on CPUs too; `use_cpu` would start one
        "distributed_type": "MULTI_GPU" if job.world_size > 1 else "NO",
        "num_machines": hosts.count,
        "num_processes": job.world_size,
        "machine_rank": hosts.number or 0,
        "main_process_ip": job.master_address,
        # 0: one that is free
        "main_process_port": job.master_port if hosts.count > 1 else 0,
        # the rendezvous is at the master's address, which all can reach
        "same_network": True,
        "rdzv_backend": "static",
        "main_training_function": "main",
        "mixed_precision": "no",  # the recipe's deepspeed.precision is what counts
        "use_cpu": False,
        "debug": False,
    }
    return yaml.safe_dump(settings, sort_keys=False)


def _job(
    configs: Sequence[str], resume: str, options: Sequence[str], hosts: Hosts, flag: str
) -> Job:
    processes = hosts.processes or gpus_here() or 1
    what = f"{hosts.count} host(s) with {processes} process(es) each"
    job = describe_job(
        *(configs, resume, options, [processes] * hosts.count, what),
        environment=given_environment(hosts.env, os.environ),
    )
    if hosts.count == 1:
        if hosts.number:
            raise LaunchError(f"--node-rank {hosts.number}: there is one host; give --nodes N")
        return job
    if hosts.number is None or not hosts.master:
        missing = "--node-rank" if hosts.number is None else flag
        raise LaunchError(
            f"--nodes {hosts.count}: each host is started by itself, and needs to know --node-rank "
            f"(0 to {hosts.count - 1}) and {flag} HOST:PORT of host 0; {missing} is missing"
        )
    if hosts.number >= hosts.count:
        raise LaunchError(
            f"--node-rank {hosts.number}: there are {hosts.count} hosts; they count from 0"
        )
    address, colon, port = hosts.master.rpartition(":")
    if not colon or not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise LaunchError(f"{flag} {hosts.master}: is not HOST:PORT; give host 0's, as in a:29500")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    elif re.search(r"[][:]", address):  # whether its end is a port, nobody knows
        raise LaunchError(
            f"{flag} {hosts.master}: is not HOST:PORT; an address of IPv6 stands between brackets "
            "there, as in [fd00::1]:29500"
        )
    return replace(job, master_address=address, master_port=int(port))


def _own_address(job: Job) -> str:
    try:
        return own_address(job.master_address, job.master_port)
    except OSError as error:
        host = job.master_address
        raise LaunchError(
            f"--rdzv-endpoint {host}:{job.master_port}: {host} can't be found from here "
            f"({error.strerror}); give its address, or this host's own with --local-addr"
        ) from None


def _mine(job: Job, hosts: Hosts) -> Ranks:
    """The ranks that this host starts. Which numbers they get is decided when the hosts meet."""
    return job.ranks_of_host(hosts.number or 0, {})
