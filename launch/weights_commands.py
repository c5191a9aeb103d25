"""Commands about what was trained: eval, export, report, demo."""

import argparse
from pathlib import Path

from .parser import Commands, add_command, positive


def _eval(commands: Commands) -> None:
    parser = add_command(commands, "eval", "COCO metrics of exported weights")
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="FILE|RUN", help="exported weights, or a run"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="SHARDS|JSON",
        help="shards, or COCO annotations",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="images, where --data is a JSON")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the numbers there")
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="default 16")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes")

    def run(options: argparse.Namespace) -> None:
        from ..recipes.evaluate import evaluate_command

        evaluate_command(
            options.weights,
            options.data,
            options.images,
            options.output,
            options.batch,
            options.workers,
        )

    parser.set_defaults(run_command=run)


def _export(commands: Commands) -> None:
    parser = add_command(commands, "export", "one safetensors file from a run's sharded checkpoint")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="to be written")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="instead of the newest")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the averaged weights (default), or the last ones",
    )

    def run(options: argparse.Namespace) -> None:
        from ..recipes.export import export

        sha256, step = export(options.run, options.output, options.checkpoint, options.ema)
        print(f"{options.output}: weights of step {step}")
        print(f"weights sha256 {sha256}")

    parser.set_defaults(run_command=run)


def _report(commands: Commands) -> None:
    parser = add_command(commands, "report", "figures of runs: curves and predictions")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the figures")

    def run(options: argparse.Namespace) -> None:
        from ..recipes.report import report

        for path in report(options.runs, options.output):
            print(path)

    parser.set_defaults(run_command=run)


def _demo(commands: Commands) -> None:
    parser = add_command(commands, "demo", "a web page that finds objects in uploaded pictures")
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="FILE|RUN", help="exported weights, or a run"
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860; 0: any")

    def run(options: argparse.Namespace) -> None:
        from ..demo.app import serve

        serve(_exported(options.weights), options.port)

    parser.set_defaults(run_command=run)


def _exported(weights: Path) -> Path:
    """A weights file; of a run folder the latest export, or one made on the spot."""
    if not weights.is_dir():
        return weights
    from ..recipes.export import latest_export

    return latest_export(weights)


COMMANDS = (_eval, _export, _report, _demo)
