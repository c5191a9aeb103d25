"""The command that looks before anything starts: doctor, and `launch`, which asks it first."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parser import Commands, add_command, port, positive, whole_number
from .recipe_options import RECIPE_KEYS, add_recipe_options

if TYPE_CHECKING:  # `--help` imports no recipe
    from .doctor.setup import Setup

_EPILOG = """Each finding is a line: severity, where, what, why it matters, the mend.
Exit code 0: the run may start, there are warnings at most; 1: there is an error; 2: the doctor was
asked wrongly.

"""


def _doctor(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        "every reason why a run would fail, on every host, before it starts",
        _EPILOG + RECIPE_KEYS.format(command="doctor"),
    )
    add_recipe_options(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="lines of `host slots=N`; default: this host"
    )
    where.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="on this machine; default: as many GPUs as the batch divides by, or 1 CPU process",
    )
    where.add_argument(
        "--slurm",
        action="store_true",
        help="on all hosts of the Slurm job that this runs in",
    )
    parser.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help="judge the batch for so many ranks: those of all hosts, where ssh does not reach the "
        "others; default: those of the hostfile, or of this machine",
    )
    parser.add_argument(
        "--master-addr", metavar="HOST", help="where the ranks meet; default: the first host"
    )
    parser.add_argument(
        "--master-port", type=port, default=29500, metavar="N", help="default 29500"
    )
    parser.add_argument(
        "--node-rank",
        type=whole_number,
        metavar="K",
        help="which host this is, from 0, where ssh does not reach the others: the port must be "
        "free on host 0, and --master-addr be found from all",
    )
    parser.add_argument("--ssh-port", type=port, metavar="N", help="default: ssh's own")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable that the ranks get, as for `launch`; may be given again",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write findings and facts there")
    parser.set_defaults(run_command=_run)


def _run(options: argparse.Namespace) -> int:
    from ..recipes.figures import check_writable
    from ..recipes.files import write_whole
    from .doctor.examine import examine_all
    from .doctor.findings import exit_code, format_findings
    from .doctor.setup import Setup

    _check_world_size(options)
    if options.json:
        check_writable(options.json)
    setup = Setup(
        configs=options.config,
        options=options.rest,
        resume=options.resume,
        hostfile=options.hostfile,
        slurm=options.slurm,
        processes=options.processes,
        world_size=options.world_size,
        master_address=options.master_addr,
        master_port=options.master_port,
        node_rank=options.node_rank,
        ssh_port=options.ssh_port,
        env=options.env,
    )
    found = examine_all(setup)
    code = exit_code(found.findings)
    for note in found.notes:
        print(note)
    print(format_findings(found.findings, len(found.hosts)))
    if options.json:
        record: dict[str, Any] = {
            "exit_code": code,
            "findings": [asdict(finding) for finding in found.findings],
            "notes": found.notes,
            "hosts": {host: its.model_dump() for host, its in found.facts.items()},
            "bandwidth_gbit": found.bandwidth_gbit,
            "recipe": found.needs.model_dump() if found.needs else None,
        }
        write_whole(options.json, json.dumps(record, indent=2) + "\n")
    return code


def _check_world_size(options: argparse.Namespace) -> None:
    """Ends the program where the ranks of all hosts contradict the other options."""
    reached = options.hostfile or options.slurm
    if options.node_rank is not None and (reached or not options.master_addr):
        options.parser.error(
            "--node-rank is of hosts that ssh does not reach: give it with --master-addr of host "
            "0, and without --hostfile and --slurm"
        )
    all_ranks, here = options.world_size, options.processes or 1
    if all_ranks and (options.hostfile or options.slurm):
        other = "--hostfile" if options.hostfile else "--slurm"
        options.parser.error(f"--world-size and {other} both count all ranks; give one of them")
    if all_ranks and all_ranks < here:
        options.parser.error(
            f"--world-size {all_ranks}: counts the ranks of all hosts, and --processes {here} of "
            "this one are more; give the sum"
        )


def ask_about_launch(options: argparse.Namespace, here: bool = True) -> None:
    """What `launch` asks before it starts anything. Warnings are only told.

    Args:
        options: of `launch`, which its launcher found right.
        here: whether the ranks, or the program that starts them, run on this machine.

    Raises:
        LaunchError: the run would fail; the reasons were printed.
    """
    from .doctor.examine import examine
    from .doctor.findings import exit_code, format_findings
    from .job import LaunchError

    findings = examine(_launch_setup(options, here))
    if findings:
        print(format_findings(findings), file=sys.stderr, flush=True)
    if exit_code(findings):
        raise LaunchError("the doctor found errors, see above; mend them, or add --no-doctor")


def _launch_setup(options: argparse.Namespace, here: bool) -> "Setup":
    from .doctor.setup import Setup
    from .hostfile import read_hostfile
    from .job import gpus_here

    hostfile: Path | None = getattr(options, "hostfile", None)
    processes: int | None = getattr(options, "processes", None)
    world_size = node_rank = None
    address, port = getattr(options, "master_addr", None), getattr(options, "master_port", 29500)
    option = "--master-port"
    if hostfile and options.no_ssh:  # others look at the other hosts
        slots, node_rank = read_hostfile(hostfile), options.node_rank
        address = address or next(iter(slots)).rpartition("@")[2]
        world_size, processes = sum(slots.values()), list(slots.values())[node_rank]
        hostfile = None
    elif hasattr(options, "nodes"):  # slurm, torchrun, accelerate
        processes = options.processes_per_node or gpus_here() or 1
        world_size = processes * options.nodes
        if here and options.nodes > 1:  # one host alone picks a port that is free
            node_rank = options.node_rank
            address, _, number = options.master.rpartition(":")
            port = int(number)
            option = "--rdzv-endpoint" if hasattr(options, "rdzv_id") else "--master"
    return Setup(
        configs=options.config,
        options=options.rest,
        resume=options.resume,
        hostfile=hostfile,
        processes=processes,
        world_size=world_size,
        master_address=address,
        master_port=port,
        master_option=option,
        node_rank=node_rank,
        elsewhere=not here,
        ssh_port=getattr(options, "ssh_port", None),
        env=getattr(options, "env", ()),
    )


COMMANDS = (_doctor,)
