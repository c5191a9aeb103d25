"""The command that says what a recipe costs on a cluster: plan, and `launch --plan`."""

import argparse
import json
import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .parser import Commands, Parser, add_command, positive
from .recipe_options import RECIPE_KEYS

if TYPE_CHECKING:  # `--help` imports neither
    from ..recipes.config import Recipe
    from ..recipes.plan import Plan

GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
# Of an A100 in a node with NVLink; its peak follows from the recipe's precision. The share of that
# is a guess.
HARDWARE = {"gpu_tflops": None, "mfu": 0.3, "network_gbit": 200.0, "link_gbit": 2400.0}


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
    add_hardware_options(parser)
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="default 8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.set_defaults(takes_recipe_keys=True, run_command=_run)


def add_hardware_options(parser: "Parser | argparse._ArgumentGroup") -> None:
    """Adds the figures of GPU and network that a plan is made for."""
    parser.add_argument(
        "--gpu-tflops",
        type=_above_zero,
        default=HARDWARE["gpu_tflops"],
        metavar="X",
        help="peak of a GPU in the recipe's precision, default that of an A100: 312, fp32 156",
    )
    parser.add_argument(
        "--mfu",
        type=_share,
        default=HARDWARE["mfu"],
        metavar="X",
        help="share of the peak that training reaches, default 0.3: a guess; a run says its own",
    )
    parser.add_argument(
        "--network-gbit",
        type=_above_zero,
        default=HARDWARE["network_gbit"],
        metavar="X",
        help="Gbit/s of a node to the others, all adapters together, default 200",
    )
    parser.add_argument(
        "--link-gbit",
        type=_above_zero,
        default=HARDWARE["link_gbit"],
        metavar="X",
        help="Gbit/s one way of a GPU to its node's others, default 2400 (A100, NVLink)",
    )


def _run(options: argparse.Namespace) -> None:
    from ..recipes.figures import check_writable
    from ..recipes.files import write_whole

    recipe = _recipe(options)
    if options.json:
        check_writable(options.json)
    plan = _print_plan(recipe, options.gpus, options, options.gpus_per_node)
    if options.json:
        write_whole(options.json, json.dumps(plan.as_record(), indent=2) + "\n")


def _recipe(options: argparse.Namespace) -> "Recipe":
    from ..recipes.load import load_recipe, recipe_path

    return load_recipe([recipe_path(name) for name in options.config], options.rest)


def _print_plan(
    recipe: "Recipe", gpus: Collection[int], options: argparse.Namespace, gpus_per_node: int
) -> "Plan":
    # DeepSpeed is asked for its defaults alone; without a GPU it would warn that it found none.
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ..recipes.plan import Hardware, make_plan
    from ..recipes.plan_table import format_plan
    from ..recipes.utilization import PEAK_TFLOPS

    hardware = {name: getattr(options, name) for name in HARDWARE}
    hardware["gpu_tflops"] = (
        options.gpu_tflops or PEAK_TFLOPS["A100"][recipe.deepspeed.precision == "fp32"]
    )
    nodes = Hardware(gpus_per_node=gpus_per_node, **hardware)
    plan = make_plan(recipe, sorted(set(gpus)), nodes)
    print(format_plan(plan))
    return plan


def plan_launch(options: argparse.Namespace) -> None:
    """Prints the plan of a launch: of its ranks, and of the numbers of GPUs beside theirs.

    Args:
        options: of any launcher.

    Raises:
        LaunchError, RecipeError: a mistake in the hostfile or the recipe, or ranks that do not
            share the batch, in one sentence.
    """
    from .job import check_shares

    recipe = _recipe(options)
    slots = _slots(options, recipe)
    ranks, most = sum(slots), max(slots)
    check_shares(recipe, ranks, "this launch")
    print(f"this launch: {ranks} rank(s) on {len(slots)} host(s), at most {most} on one\n")
    _print_plan(recipe, {*GPUS, ranks}, options, most)
    words = [word for name in options.config for word in ("--config", name)]
    words += [*options.rest, "--gpus", str(ranks), "--gpus-per-node", str(most)]
    for name, usual in HARDWARE.items():
        figure = getattr(options, name)
        words += [f"--{name.replace('_', '-')}", f"{figure:g}"] if figure != usual else []
    print(f"\nfor other numbers of GPUs: convnext-yolo plan {shlex.join(words)}")


def _slots(options: argparse.Namespace, recipe: "Recipe") -> Sequence[int]:
    """The ranks of each host, as the launcher would have them."""
    from .hostfile import read_hostfile
    from .job import fitting, gpus_here

    if hasattr(options, "hostfile"):  # deepspeed
        return list(read_hostfile(options.hostfile).values())
    if hasattr(options, "nodes"):  # slurm, torchrun, accelerate
        return [options.processes_per_node or gpus_here() or 1] * options.nodes
    gpus = 0 if options.processes else gpus_here()
    return [options.processes or (fitting(recipe, gpus) if gpus else 1)]


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
