"""Commands that measure: bench infer, bench loader."""

import argparse
import json
from pathlib import Path

from .parser import Commands, add_command, positive


def _bench(commands: Commands) -> None:
    parser = add_command(commands, "bench", "measure speed, always against something in one run")
    what = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    _infer(what)
    _loader(what)


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


COMMANDS = (_bench,)
