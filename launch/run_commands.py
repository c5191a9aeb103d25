"""Commands that train: train, launch."""

import argparse
from pathlib import Path

from .launch_commands import add_launch
from .parser import Commands, add_command, positive
from .recipe_options import RECIPE_KEYS, add_recipe_options


def _train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        "train a recipe, alone or as one of a launcher's processes",
        RECIPE_KEYS.format(command="train"),
    )
    add_recipe_options(parser)

    def run(options: argparse.Namespace) -> int:
        from ..recipes.preemption import launchers_above

        above = launchers_above()  # first of all
        from ..recipes.load import load_recipe, recipe_path

        recipe = load_recipe([recipe_path(name) for name in options.config], options.rest)
        from ..recipes.train import train

        return train(recipe, options.resume, above)

    parser.set_defaults(run_command=run, is_run_by_ranks=True)


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


COMMANDS = (_preview, _train, add_launch)
