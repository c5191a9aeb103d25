"""The command that says what a recipe costs on a cluster: plan."""

import argparse
import json
import os
from pathlib import Path

from .parser import Commands, Parser, add_command, positive
from .recipe_options import RECIPE_KEYS

GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def _plan(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plan",
        "memory, communication and expected time of a recipe, from 1 to 1,024 GPUs",
        RECIPE_KEYS.format(command="plan"),
    )
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="recipe, or the name of one that comes with the package; may be given again",
    )
    parser.add_argument(
        "--gpus",
        type=positive,
        nargs="+",
        default=GPUS,
        metavar="N",
        help="numbers of GPUs, default 1 2 4 … 1024",
    )
    _hardware_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.set_defaults(takes_recipe_keys=True, run_command=_run)


def _hardware_options(parser: Parser) -> None:
    parser.add_argument(
        "--gpu-tflops",
        type=_above_zero,
        default=312.0,
        metavar="X",
        help="peak of a GPU in the recipe's precision, default 312 (A100, bf16)",
    )
    parser.add_argument(
        "--mfu",
        type=_share,
        default=0.3,
        metavar="X",
        help="share of the peak that training reaches, default 0.3: a guess; a run says its own",
    )
    parser.add_argument(
        "--network-gbit",
        type=_above_zero,
        default=200.0,
        metavar="X",
        help="Gbit/s of a node to the others, all adapters together, default 200",
    )
    parser.add_argument(
        "--link-gbit",
        type=_above_zero,
        default=2400.0,
        metavar="X",
        help="Gbit/s one way of a GPU to its node's others, default 2400 (A100, NVLink)",
    )
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="default 8")


def _run(options: argparse.Namespace) -> None:
    # DeepSpeed is asked for its defaults alone; without a GPU it would warn that it found none.
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ..recipes.figures import check_writable
    from ..recipes.files import write_whole
    from ..recipes.load import load_recipe, recipe_path
    from ..recipes.plan import Hardware, make_plan
    from ..recipes.plan_table import format_plan

    recipe = load_recipe([recipe_path(name) for name in options.config], options.rest)
    if options.json:
        check_writable(options.json)
    hardware = Hardware(
        gpu_tflops=options.gpu_tflops,
        mfu=options.mfu,
        network_gbit=options.network_gbit,
        link_gbit=options.link_gbit,
        gpus_per_node=options.gpus_per_node,
    )
    plan = make_plan(recipe, sorted(set(options.gpus)), hardware)
    print(format_plan(plan))
    if options.json:
        write_whole(options.json, json.dumps(plan.as_record(), indent=2) + "\n")


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _share(text: str) -> float:
    value = _above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than the whole, 1")
    return value


COMMANDS = (_plan,)
