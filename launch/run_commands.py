"""Commands that train: train, launch."""

import argparse
from pathlib import Path

from .parser import Commands, Parser, add_command, positive

RECIPE_KEYS = """Any key of the recipe is an option, later ones win:
  convnext-yolo {command} --config recipes/quickstart.yaml --optimizer.lr 0.001 --run runs/other
`recipe.yaml` in the run's folder shows every key with its value."""


def _recipe_options(parser: Parser) -> None:
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="recipe, or the name of one that comes with the package; may be given again: "
        "later files win key by key",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): go on from the run's newest checkpoint that verifies, if any",
    )
    parser.set_defaults(takes_recipe_keys=True)


def _train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        "train a recipe, alone or as one of a launcher's processes",
        RECIPE_KEYS.format(command="train"),
    )
    _recipe_options(parser)

    def run(options: argparse.Namespace) -> None:
        from ..recipes.load import load_recipe, recipe_path

        recipe = load_recipe([recipe_path(name) for name in options.config], options.rest)
        from ..recipes.train import train

        train(recipe, options.resume)

    parser.set_defaults(run_command=run)


def _launch(commands: Commands) -> None:
    parser = add_command(commands, "launch", "run `train` under a launcher")
    where = parser.add_subparsers(title="where", metavar="WHERE", required=True)
    local = add_command(
        where,
        "local",
        "this machine: the deepspeed launcher, a process for each GPU",
        RECIPE_KEYS.format(command="launch local"),
    )
    local.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="default: as many GPUs as the batch divides by, or 1 CPU process",
    )
    cluster = add_command(
        where,
        "deepspeed",
        "the hosts of a hostfile: the deepspeed launcher over ssh",
        RECIPE_KEYS.format(command="launch deepspeed"),
    )
    cluster.add_argument(
        "--hostfile", type=Path, required=True, metavar="FILE", help="lines of `host slots=N`"
    )
    for each in (local, cluster):
        _recipe_options(each)
        each.add_argument("--dry-run", action="store_true", help="print the command, run nothing")

    def run_local(options: argparse.Namespace) -> None:
        from . import launchers

        command = launchers.local(options.config, options.resume, options.rest, options.processes)
        launchers.run(command, options.dry_run)

    def run_cluster(options: argparse.Namespace) -> None:
        from . import launchers

        command = launchers.deepspeed(
            options.config, options.resume, options.rest, options.hostfile
        )
        launchers.run(command, options.dry_run)

    local.set_defaults(run_command=run_local)
    cluster.set_defaults(run_command=run_cluster)


def _preview(commands: Commands) -> None:
    parser = add_command(
        commands,
        "preview",
        "draw augmented samples of a recipe's training data, and its statistics",
        "Any key of the recipe is an option, as for `train`:\n"
        "  convnext-yolo preview --config quickstart --augment.mosaic 0 --seed 1",
    )
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="recipe, or the name of one that comes with the package; may be given again",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("preview.png"),
        metavar="PNG",
        help="default preview.png",
    )
    parser.add_argument(
        "--samples", type=positive, default=12, metavar="N", help="how many are drawn, default 12"
    )
    parser.add_argument(
        "--step", type=int, default=0, metavar="K", help="of which global batch, default 0"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the statistics there")
    parser.set_defaults(takes_recipe_keys=True)

    def run(options: argparse.Namespace) -> None:
        from ..recipes.load import load_recipe, recipe_path

        recipe = load_recipe([recipe_path(name) for name in options.config], options.rest)
        from ..recipes.preview import preview

        statistics = preview(recipe, options.output, options.samples, options.step, options.json)
        print(statistics.table())
        for path in filter(None, (options.output, options.json)):
            print(path)

    parser.set_defaults(run_command=run)


COMMANDS = (_preview, _train, _launch)
