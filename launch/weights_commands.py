"""Commands about what was trained: eval, export, import, report, demo."""

import argparse
from pathlib import Path

from .parser import Commands, Parser, add_command, positive


def _eval(commands: Commands) -> None:
    parser = add_command(commands, "eval", "COCO metrics of exported weights")
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="FILE|RUN", help="exported weights, or a run"
    )
    parser.add_argument(
        "--data",  # no Path: it would take a slash out of a URL
        required=True,
        metavar="SHARDS|URL|JSON",
        help="shards, their URL (http, https, s3, gs), or COCO annotations",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="images, where --data is a JSON")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the numbers there")
    parser.add_argument(
        "--letterbox",
        choices=("rect", "square"),
        default="rect",
        help="rect (default): batches of like pictures in frames hardly larger than they are, as "
        "YOLO's published numbers; square: all in the frame of the training",
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="default 8")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes")
    remote = parser.add_argument_group("where --data is a URL")
    remote.add_argument(
        "--cache", metavar="DIR", help="keep what is fetched; default ~/.cache/convnext-yolo"
    )
    remote.add_argument("--cache-gib", type=_above_zero, metavar="N", help="of it, default 50")
    remote.add_argument(
        "--patience-s",
        type=_above_zero,
        metavar="N",
        help="how long the host may stay away before the command gives up, default 300",
    )

    def run(options: argparse.Namespace) -> None:
        from ..recipes.build import cache_options
        from ..recipes.config import DataSection
        from ..recipes.evaluate import evaluate_command

        names = ("cache", "cache_gib", "patience_s")
        given = {name: getattr(options, name) for name in names if getattr(options, name)}
        evaluate_command(
            options.weights,
            options.data,
            options.images,
            options.output,
            options.batch,
            options.workers,
            options.letterbox,
            cache_options(DataSection(**given)),
        )

    parser.set_defaults(run_command=run, is_run_by_ranks=True)


def _above_zero(text: str) -> float:
    """The type of an amount."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _export(commands: Commands) -> None:
    parser = add_command(commands, "export", "one safetensors file from a run's checkpoint; ONNX")
    parser.add_argument(
        "run", type=Path, metavar="RUN|FILE", help="the run's folder; for --onnx also its export"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="safetensors, to be written")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR|best", help="not the newest")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the averaged weights (default), or the last ones",
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="ONNX, to be written as well")
    parser.add_argument("--onnx-nms", action="store_true", help="suppression inside the graph")
    parser.add_argument(
        "--confidence", type=float, default=0.25, metavar="P", help="of --onnx-nms; default 0.25"
    )
    parser.add_argument(
        "--iou", type=float, default=0.45, metavar="P", help="of --onnx-nms; default 0.45"
    )

    def run(options: argparse.Namespace) -> None:
        from ..recipes.export import export_command
        from ..recipes.onnx_export import Suppression

        export_command(
            options.run,
            options.output,
            options.checkpoint,
            options.ema,
            options.onnx,
            Suppression(options.confidence, options.iou) if options.onnx_nms else None,
        )

    parser.set_defaults(run_command=run)


def _import(commands: Commands) -> None:
    parser = add_command(
        commands,
        "import",
        "weights from elsewhere as exported weights",
        epilog="Upstream's weights keep their licence, GPL-3.0 or AGPL-3.0, when imported.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--yolov5", type=Path, metavar="FILE", help="upstream's .pt, or safetensors of its names"
    )
    source.add_argument(
        "--deepspeed",
        type=Path,
        metavar="DIR",
        help="DeepSpeed's own checkpoint, as in RUN/checkpoints/STEP/native",
    )
    parser.add_argument(
        "--model",
        choices=("yolov5n", "yolov5s", "yolov5m", "yolov5l"),
        help="which model the file of --yolov5 is",
    )
    parser.add_argument(
        "--image-px",
        type=_frame_side,
        default=640,
        metavar="N",
        help="side of the frame that the detector is for, default 640",
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="RECIPE",
        help="of the model, where another program wrote the checkpoint of --deepspeed",
    )
    parser.add_argument("--data", metavar="SHARDS", help="whose classes it has, if not --config's")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="to be written")

    def run(options: argparse.Namespace) -> None:
        if options.deepspeed:
            _import_deepspeed(parser, options)
        elif options.config or options.data:
            parser.error("--config and --data are about --deepspeed; drop them")
        else:
            _import_yolov5(parser, options)

    parser.set_defaults(run_command=run)


def _import_yolov5(parser: Parser, options: argparse.Namespace) -> None:
    if options.model is None:
        parser.error("--yolov5 needs --model: which model the file is")
    from ..model.yolov5_import import import_yolov5

    frame_px = (options.image_px, options.image_px)
    sha256, info = import_yolov5(options.yolov5, options.model, options.output, frame_px)
    print(f"{options.output}: {options.model}, {len(info.classes)} classes")
    print(f"weights sha256 {sha256}")


def _import_deepspeed(parser: Parser, options: argparse.Namespace) -> None:
    if options.model:
        parser.error("--model is about --yolov5; drop it")
    if options.data and not options.config:
        parser.error("--data goes with --config: the recipe of the model")
    from ..recipes.deepspeed_import import import_deepspeed
    from ..recipes.load import load_recipe, recipe_path

    recipe = None
    if options.config:
        data = ["--data.train", options.data] if options.data else []
        recipe = load_recipe([recipe_path(name) for name in options.config], data)
    print(import_deepspeed(options.deepspeed, options.output, recipe))


def _frame_side(text: str) -> int:
    """The type of a frame's side."""
    side = positive(text)
    if side < 64 or side % 32:
        raise argparse.ArgumentTypeError(f"{side} is not a multiple of 32 from 64 up")
    return side


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
        from ..recipes.export import exported_weights

        serve(exported_weights(options.weights), options.port)

    parser.set_defaults(run_command=run)


COMMANDS = (_eval, _export, _import, _report, _demo)
