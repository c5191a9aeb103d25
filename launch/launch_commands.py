"""The command `launch`, one sub-command for each launcher."""

import argparse
from collections.abc import Callable
from pathlib import Path

from .doctor_commands import ask_about_launch
from .parser import Commands, Parser, add_command, port, positive, whole_number
from .plan_commands import add_hardware_options, plan_launch
from .recipe_options import RECIPE_KEYS, add_recipe_options
from .supervision.stall import LIMIT_S


def add_launch(commands: Commands) -> None:
    """Adds `launch` with all its launchers."""
    parser = add_command(commands, "launch", "run `train` under a launcher")
    where = parser.add_subparsers(title="where", metavar="WHERE", required=True)
    for add in (_local, _deepspeed, _slurm, _torchrun, _accelerate):
        add(where)


def _launcher(where: Commands, name: str, text: str, epilog: str = "") -> Parser:
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


def _add_env(parser: Parser) -> None:
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the ranks, as NCCL_SOCKET_IFNAME=eth0; may be given again",
    )


def _run(parser: Parser, render: Callable[[argparse.Namespace], object], here: bool = True) -> None:
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

        before: list[str] = []  # the newest checkpoint when the first was started

        def command(lost: frozenset[str]) -> Command:
            if lost:
                if not hasattr(options, "lost"):
                    raise LaunchError(f"{', '.join(sorted(lost))} is lost, and there is no other")
                options.lost = lost
            if before and before[0] != _newest(options):
                options.resume = "auto"  # else what was named is still where the run is to go on
            before[:] = before or [_newest(options)]
            rendered = render(options)
            assert isinstance(rendered, Command)
            return rendered

        run(command, options.dry_run, getattr(options, "max_restarts", 0), options.stall_s)

    parser.set_defaults(run_command=run)


def _newest(options: argparse.Namespace) -> str:
    """The name of the newest checkpoint of the run, if any."""
    from ..recipes.load import load_recipe, recipe_path

    recipe = load_recipe([recipe_path(name) for name in options.config], options.rest)
    names = sorted(path.name for path in (Path(recipe.run) / "checkpoints").glob("step-????????"))
    return names[-1] if names else ""


def _local(where: Commands) -> None:
    parser = _launcher(
        where, "local", "this machine: the deepspeed launcher, a process for each GPU"
    )
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="default: as many GPUs as the batch divides by, or 1 CPU process",
    )

    def render(options: argparse.Namespace) -> object:
        from .launchers import local

        return local(options.config, options.resume, options.rest, options.processes)

    _run(parser, render)


_DEEPSPEED_EPILOG = """
The hosts need this Python and these folders at the same paths. Without ssh between them, start the
same command on each host of the hostfile, with --no-ssh --node-rank 0, 1 and so on.
"""


def _deepspeed(where: Commands) -> None:
    parser = _launcher(
        where,
        "deepspeed",
        "the hosts of a hostfile: the deepspeed launcher over ssh",
        _DEEPSPEED_EPILOG,
    )
    parser.add_argument(
        "--hostfile", type=Path, required=True, metavar="FILE", help="lines of `host slots=N`"
    )
    parser.add_argument(
        "--no-ssh", action="store_true", help="start this host's ranks only; with --node-rank"
    )
    parser.add_argument(
        "--node-rank",
        type=whole_number,
        metavar="K",
        help="with --no-ssh: which host of the hostfile this is, from 0",
    )
    _add_master(parser, "the first host's name in the hostfile")
    parser.add_argument("--ssh-port", type=port, metavar="N", help="default: ssh's own")
    _add_env(parser)
    parser.set_defaults(lost=frozenset())

    def render(options: argparse.Namespace) -> object:
        from .launchers import deepspeed

        if options.no_ssh != (options.node_rank is not None):
            parser.error("--no-ssh and --node-rank K go together; give both or none")
        return deepspeed(
            *(options.config, options.resume, options.rest, options.hostfile),
            node_rank=options.node_rank,
            master_address=options.master_addr,
            master_port=options.master_port,
            ssh_port=options.ssh_port,
            env=options.env,
            lost=options.lost,
        )

    _run(parser, render)


def _add_master(parser: Parser, default: str) -> None:
    parser.add_argument(
        "--master-addr", metavar="HOST", help=f"where the ranks meet; default: {default}"
    )
    parser.add_argument(
        "--master-port", type=port, default=29500, metavar="N", help="default 29500"
    )


_SLURM_EPILOG = """
Writes a job script and the recipe as it is now to RUN/launch/, and submits it. The job publishes a
checkpoint when Slurm is about to end it, and goes back into the queue until the run is finished.
Before that the doctor looks at recipe, batch, shards, weights, run folder and --resume, as this
host sees them, and at nothing else; if the job's hosts alone have some of it, give --no-doctor.
"""


def _slurm(where: Commands) -> None:
    parser = _launcher(where, "slurm", "a Slurm job that requeues itself", _SLURM_EPILOG)
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="default 1")
    parser.add_argument(
        "--processes-per-node", type=positive, default=1, metavar="N", help="default 1"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=whole_number,
        metavar="N",
        help="default: one for each process; 0: none are asked for",
    )
    parser.add_argument(
        "--cpus-per-process",
        type=positive,
        metavar="N",
        help="default: the recipe's loader processes, and one",
    )
    for option in ("time", "partition", "account"):
        parser.add_argument(f"--{option}", metavar=option.upper(), help="as sbatch takes it")
    parser.add_argument(
        "--warning-s",
        type=positive,
        default=120,
        metavar="S",
        help="save so long before the time limit, default 120 s",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="further options of sbatch, as --sbatch=--exclusive; may be given again",
    )
    _add_env(parser)

    def render(options: argparse.Namespace) -> object:
        from .slurm import Allocation, slurm

        allocation = Allocation(
            nodes=options.nodes,
            processes=options.processes_per_node,
            gpus=options.gpus_per_node,
            cpus=options.cpus_per_process,
            time=options.time,
            partition=options.partition,
            account=options.account,
            warning_s=options.warning_s,
            stall_s=options.stall_s,
            more=tuple(options.sbatch),
            env=tuple(options.env),
        )
        return slurm(options.config, options.resume, options.rest, allocation)

    _run(parser, render, here=False)  # restarts are Slurm's part, and the hosts not known yet


_BY_HAND = """
One host: nothing more is needed. Several: start the same command on each, with its --node-rank.
"""


def _add_hosts(parser: Parser, flag: str, metavar: str) -> None:
    parser.add_argument("--nodes", "--nnodes", type=positive, default=1, metavar="N", help="hosts")
    parser.add_argument("--node-rank", type=whole_number, metavar="K", help="this host, from 0")
    parser.add_argument(flag, dest="master", metavar=metavar, help="where host 0 is reached")
    parser.add_argument(
        "--processes-per-node",
        type=positive,
        metavar="N",
        help="default: a process for each GPU of this host, or 1 on the CPU",
    )
    _add_env(parser)


def _torchrun(where: Commands) -> None:
    parser = _launcher(where, "torchrun", "this host's part of a torchrun job", _BY_HAND)
    _add_hosts(parser, "--rdzv-endpoint", "HOST:PORT")
    parser.add_argument(
        "--rdzv-id", default="convnext-yolo", metavar="ID", help="the same on all hosts"
    )
    parser.add_argument(
        "--local-addr", metavar="ADDRESS", help="of this host; default: the one that faces host 0"
    )

    def render(options: argparse.Namespace) -> object:
        from .elastic import Hosts, torchrun

        hosts = Hosts(
            count=options.nodes,
            number=options.node_rank,
            processes=options.processes_per_node,
            master=options.master,
            local_address=options.local_addr,
            env=tuple(options.env),
        )
        return torchrun(options.config, options.resume, options.rest, hosts, options.rdzv_id)

    _run(parser, render)


def _accelerate(where: Commands) -> None:
    parser = _launcher(where, "accelerate", "this host's part of an accelerate job", _BY_HAND)
    _add_hosts(parser, "--master", "HOST:PORT")

    def render(options: argparse.Namespace) -> object:
        from .elastic import Hosts, accelerate

        hosts = Hosts(
            count=options.nodes,
            number=options.node_rank,
            processes=options.processes_per_node,
            master=options.master,
            env=tuple(options.env),
        )
        return accelerate(options.config, options.resume, options.rest, hosts)

    _run(parser, render)
