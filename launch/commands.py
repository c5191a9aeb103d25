"""The commands and their options.

A command imports its room only when it runs, so that `--help` answers at once.
"""

import argparse
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        "convnext-yolo",
        description="Train YOLO detectors with ConvNeXt backbones, on one machine or a cluster.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_shard, _verify, _train, _launch, _eval, _export, _report, _demo):
        add(commands)
    return parser


def _command(
    commands: "argparse._SubParsersAction[_Parser]", name: str, text: str, epilog: str = ""
) -> _Parser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser, takes_recipe_keys=False)
    return parser


RECIPE_KEYS = """Any key of the recipe is an option, later ones win:
  convnext-yolo {command} --config recipes/quickstart.yaml --optimizer.lr 0.001 --run runs/other
`recipe.yaml` in the run's folder shows every key with its value."""


def _recipe_options(parser: _Parser) -> None:
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


def _shard(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(commands, "shard", "write a COCO-format data set as WebDataset shards")
    parser.add_argument("--input", type=Path, required=True, metavar="JSON", help="annotations")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="their images")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--samples-per-shard", type=_positive, default=512, metavar="N", help="default 512"
    )
    parser.add_argument(
        "--workers", type=_positive, default=1, metavar="N", help="processes, default 1"
    )

    def run(options: argparse.Namespace) -> None:
        from ..data_prep.formats import read_coco
        from ..data_prep.shard import write_shards

        dataset = read_coco(options.input, options.images)
        manifest = write_shards(dataset, options.output, options.samples_per_shard, options.workers)
        if dataset.clipped_boxes or dataset.dropped_boxes:
            print(
                f"{options.input}: {dataset.clipped_boxes} boxes clipped at the border, "
                f"{dataset.dropped_boxes} without area dropped"
            )
        print(
            f"{options.output}: {manifest.samples} samples, {manifest.boxes} boxes, "
            f"{len(manifest.classes)} classes in {len(manifest.shards)} shard(s), "
            f"{manifest.bytes / 1e6:.1f} MB"
        )

    parser.set_defaults(run_command=run)


def _verify(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(commands, "verify", "re-read and re-hash a folder of shards")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder with manifest.json")

    def run(options: argparse.Namespace) -> None:
        from ..data_prep.errors import DataError
        from ..data_prep.manifest import Manifest, verify

        problems = verify(options.shards)
        if problems:
            raise DataError("\n".join(problems))
        manifest = Manifest.load(options.shards)
        shards = len(manifest.shards)
        print(f"{options.shards}: {manifest.samples} samples in {shards} shard(s), all good")

    parser.set_defaults(run_command=run)


def _train(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
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


def _launch(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(commands, "launch", "run `train` under a launcher")
    where = parser.add_subparsers(title="where", metavar="WHERE", required=True)
    local = _command(
        where,
        "local",
        "this machine: the deepspeed launcher, a process for each GPU",
        RECIPE_KEYS.format(command="launch local"),
    )
    local.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="default: as many GPUs as the batch divides by, or 1 CPU process",
    )
    cluster = _command(
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


def _eval(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(commands, "eval", "COCO metrics of exported weights")
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
    parser.add_argument("--batch", type=_positive, default=16, metavar="N", help="default 16")
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


def _export(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(commands, "export", "one safetensors file from a run's sharded checkpoint")
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


def _report(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(commands, "report", "figures of one run or several: curves and predictions")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the figures")

    def run(options: argparse.Namespace) -> None:
        from ..recipes.report import report

        for path in report(options.runs, options.output):
            print(path)

    parser.set_defaults(run_command=run)


def _demo(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(commands, "demo", "a web page that finds objects in uploaded pictures")
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
