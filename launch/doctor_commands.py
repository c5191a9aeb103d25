"""The command that looks before anything starts: doctor, and `launch`, which asks it first."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .parser import Commands, add_command, positive
from .recipe_options import RECIPE_KEYS, add_recipe_options

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
        "--master-port", type=positive, default=29500, metavar="N", help="default 29500"
    )
    parser.add_argument("--ssh-port", type=positive, metavar="N", help="default: ssh's own")
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
    from ..recipes.files import write_whole
    from .doctor.examine import examine_all
    from .doctor.findings import exit_code, format_findings
    from .doctor.setup import Setup

    _check_world_size(options)
    setup = Setup(
        configs=options.config,
        options=options.rest,
        resume=options.resume,
        hostfile=options.hostfile,
        processes=options.processes,
        world_size=options.world_size,
        master_address=options.master_addr,
        master_port=options.master_port,
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
    all_ranks, here = options.world_size, options.processes or 1
    if all_ranks and options.hostfile:
        options.parser.error("--world-size and --hostfile both count all ranks; give one of them")
    if all_ranks and all_ranks < here:
        options.parser.error(
            f"--world-size {all_ranks}: counts the ranks of all hosts, and --processes {here} of "
            "this one are more; give the sum"
        )


def ask_about_launch(options: argparse.Namespace) -> None:
    """What `launch` asks before it starts anything. Warnings are only told.

    Args:
        options: of `launch`.

    Raises:
        LaunchError: the run would fail; the reasons were printed.
    """
    from .doctor.examine import examine
    from .doctor.findings import exit_code, format_findings
    from .doctor.setup import Setup
    from .hostfile import read_hostfile
    from .job import LaunchError

    hostfile: Path | None = getattr(options, "hostfile", None)
    processes = getattr(options, "processes", getattr(options, "processes_per_node", None))
    world_size = processes * getattr(options, "nodes", 1) if processes else None
    if hostfile and getattr(options, "no_ssh", False):  # others look at the other hosts
        slots = list(read_hostfile(hostfile).values())
        hostfile, processes, world_size = None, slots[options.node_rank], sum(slots)
    setup = Setup(
        configs=options.config,
        options=options.rest,
        resume=options.resume,
        hostfile=hostfile,
        processes=processes,
        world_size=world_size,
        master_address=getattr(options, "master_addr", None),
        master_port=getattr(options, "master_port", 29500),
        ssh_port=getattr(options, "ssh_port", None),
        env=getattr(options, "env", ()),
    )
    findings = examine(setup)
    if findings:
        print(format_findings(findings), file=sys.stderr, flush=True)
    if exit_code(findings):
        raise LaunchError("the doctor found errors, see above; mend them, or add --no-doctor")


COMMANDS = (_doctor,)
