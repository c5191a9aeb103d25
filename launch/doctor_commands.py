"""The command that looks before anything starts: doctor."""

import argparse
import json
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
    from .doctor import examine_all
    from .doctor_findings import exit_code, format_findings
    from .doctor_setup import Setup

    setup = Setup(
        configs=options.config,
        options=options.rest,
        resume=options.resume,
        hostfile=options.hostfile,
        processes=options.processes,
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


COMMANDS = (_doctor,)
