"""The command `launch`, one sub-command for each launcher."""

import argparse
from pathlib import Path

from .launch_parser import add_env, launcher_parser, run_launcher
from .parser import Commands, Parser, add_command, port, positive, whole_number


def add_launch(commands: Commands) -> None:
    """Adds `launch` with all its launchers."""
    parser = add_command(commands, "launch", "run `train` under a launcher")
    where = parser.add_subparsers(title="where", metavar="WHERE", required=True)
    for add in (_local, _deepspeed, _slurm, _torchrun, _accelerate):
        add(where)


def _local(where: Commands) -> None:
    parser = launcher_parser(
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

    run_launcher(parser, render)


_DEEPSPEED_EPILOG = """
The hosts need this Python and these folders at the same paths. Without ssh between them, start the
same command on each host of the hostfile, with --no-ssh --node-rank 0, 1 and so on.
"""


def _deepspeed(where: Commands) -> None:
    parser = launcher_parser(
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
    add_env(parser)
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

    run_launcher(parser, render)


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
Before that the doctor looks at recipe, batch, shards, weights, run folder and --resume as this host
sees them; if the job's hosts alone have some of it, give --no-doctor. On those it looks at the
start of the job, whose log has what it found.
"""


def _slurm(where: Commands) -> None:
    parser = launcher_parser(where, "slurm", "a Slurm job that requeues itself", _SLURM_EPILOG)
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
    add_env(parser)

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
            asks_doctor=not options.no_doctor,
            more=tuple(options.sbatch),
            env=tuple(options.env),
        )
        return slurm(options.config, options.resume, options.rest, allocation)

    run_launcher(
        parser, render, here=False
    )  # restarts are Slurm's part, and the hosts not known yet


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
    add_env(parser)


def _torchrun(where: Commands) -> None:
    parser = launcher_parser(where, "torchrun", "this host's part of a torchrun job", _BY_HAND)
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

    run_launcher(parser, render)


def _accelerate(where: Commands) -> None:
    parser = launcher_parser(where, "accelerate", "this host's part of an accelerate job", _BY_HAND)
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

    run_launcher(parser, render)
