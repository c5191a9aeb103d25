"""Commands that measure: bench infer, bench loader, bench step, bench checkpoint."""

import argparse
import json
import os
from pathlib import Path

from .parser import Commands, Parser, add_command, positive


def _bench(commands: Commands) -> None:
    parser = add_command(commands, "bench", "measure speed, always against something in one run")
    what = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    _infer(what)
    _loader(what)
    _step(what)
    _checkpoint(what)


def _infer(what: Commands) -> None:
    infer = add_command(what, "infer", "size and speed of detectors, side by side")
    infer.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="recipe files, or names; the first is 1.0"
    )
    infer.add_argument("--warmup", type=positive, default=100, metavar="N", help="default 100")
    infer.add_argument("--runs", type=positive, default=300, metavar="N", help="default 300")
    infer.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        default=[1, 32],
        metavar="N",
        help="batch sizes, default 1 32; beyond 1 a run counts for as many as it has pictures",
    )
    infer.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    infer.add_argument("--figure", type=Path, metavar="PNG", help="draw them there")

    def run(options: argparse.Namespace) -> None:
        from ..recipes import bench_infer
        from ..recipes.figures import check_writable
        from ..recipes.files import write_whole

        for path in filter(None, (options.json, options.figure)):
            check_writable(path)  # before the minutes of measuring
        speeds = bench_infer.bench_infer(
            options.recipes, options.warmup, options.runs, options.batch
        )
        print(bench_infer.format_speeds(speeds))
        if options.json:
            rows = json.dumps(bench_infer.as_records(speeds), indent=2)
            write_whole(options.json, rows + "\n")
        if options.figure:
            bench_infer.draw_speeds(speeds, options.figure)

    infer.set_defaults(run_command=run)


def _loader(what: Commands) -> None:
    loader = add_command(what, "loader", "the training pipeline, next to its decoder alone")
    loader.add_argument("--data", required=True, metavar="SHARDS", help="folder of shards")
    loader.add_argument(
        "--batches", type=positive, default=20, metavar="N", help="of 16 a turn, default 20"
    )
    loader.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")

    def run(options: argparse.Namespace) -> None:
        from ..recipes import bench_loader
        from ..recipes.figures import check_writable
        from ..recipes.files import write_whole

        if options.json:
            check_writable(options.json)
        report = bench_loader.bench_loader(options.data, options.batches)
        print(bench_loader.format_loader(report))
        if options.json:
            text = json.dumps(bench_loader.as_record(report), indent=2)
            write_whole(options.json, text + "\n")

    loader.set_defaults(run_command=run)


_RANKS = """Pictures are made up, so the recipe's shards need not be there, and weights are random.
Under a launcher its processes are measured; without one the command starts its own.

Any key of the recipe is an option:
  convnext-yolo bench {command} --config convnext_tiny_coco --data.image_px "[64, 64]" \\
      --batch.global 4 --batch.micro 2
"""


def _of_a_recipe(what: Commands, name: str, text: str) -> Parser:
    parser = add_command(what, name, text, _RANKS.format(command=name))
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="RECIPE",
        help="recipe, or the name of one that comes with the package; may be given again",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="default: the GPUs of this machine, or 1 on the CPU",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.set_defaults(takes_recipe_keys=True)
    return parser


def _step(what: Commands) -> None:
    step = _of_a_recipe(what, "step", "the training step's time and memory by ZeRO stage")
    step.add_argument(
        "--stages",
        type=int,
        nargs="+",
        choices=range(4),
        default=[0, 1, 2, 3],
        metavar="N",
        help="of ZeRO, default 0 1 2 3; the first is 1.0",
    )
    step.add_argument(
        "--steps",
        type=positive,
        default=10,
        metavar="N",
        help="timed as a whole, and as many in parts, default 10",
    )
    step.add_argument(
        "--warmup", type=positive, default=3, metavar="N", help="untimed steps, default 3"
    )

    def run(options: argparse.Namespace) -> None:
        from ..recipes import bench_step
        from ..recipes.figures import check_writable
        from ..recipes.load import load_recipe, recipe_path

        if options.json:
            check_writable(options.json)
        recipe = load_recipe([recipe_path(name) for name in options.config], options.rest)
        report = bench_step.bench_step(
            recipe,
            list(dict.fromkeys(options.stages)),
            options.processes,
            options.steps,
            options.warmup,
        )
        _tell(options, bench_step.format_step(report), bench_step.as_record(report))

    step.set_defaults(run_command=run)


def _checkpoint(what: Commands) -> None:
    checkpoint = _of_a_recipe(
        what, "checkpoint", "how long a save holds training up, asynchronous and synchronous"
    )
    checkpoint.add_argument(
        "--stage", type=int, choices=range(4), metavar="N", help="of ZeRO; default: the recipe's"
    )
    checkpoint.add_argument(
        "--saves", type=positive, default=5, metavar="N", help="of each kind, default 5"
    )
    checkpoint.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="an existing folder on the disk to measure, default the current one; what is written "
        "there goes again. Of a launcher's ranks all must see it",
    )

    def run(options: argparse.Namespace) -> None:
        from ..recipes import bench_checkpoint
        from ..recipes.figures import check_writable
        from ..recipes.load import load_recipe, recipe_path

        if options.json:
            check_writable(options.json)
        recipe = load_recipe([recipe_path(name) for name in options.config], options.rest)
        report = bench_checkpoint.bench_checkpoint(
            recipe, options.stage, options.processes, options.saves, options.output
        )
        _tell(
            options,
            bench_checkpoint.format_checkpoint(report),
            bench_checkpoint.as_record(report),
        )

    checkpoint.set_defaults(run_command=run)


def _tell(options: argparse.Namespace, table: str, record: dict[str, object]) -> None:
    """Prints and writes what was found, once for all ranks of a launcher."""
    from ..recipes.distributed import stop_world
    from ..recipes.files import write_whole

    if os.environ.get("RANK", "0") == "0":
        print(table)
        if options.json:
            write_whole(options.json, json.dumps(record, indent=2) + "\n")
    stop_world()


COMMANDS = (_bench,)
