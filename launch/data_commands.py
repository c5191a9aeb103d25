"""Commands about data: fetch-coco, shard, verify."""

import argparse
from pathlib import Path

from .parser import Commands, add_command, positive, whole_number


def _fetch_coco(commands: Commands) -> None:
    parser = add_command(commands, "fetch-coco", "download, check and unpack COCO 2017")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the data")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("train", "val"),
        default=("train", "val"),
        help="default: both, in 41 GB while it runs; val alone takes 2.2 GB",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--mirror", metavar="URL", help="has zips/ and annotations/ below it")
    source.add_argument("--archives", type=Path, metavar="DIR", help="has the zips already")
    parser.add_argument("--keep-archives", action="store_true", help="leave the zips in --output")

    def run(options: argparse.Namespace) -> None:
        import shlex

        from ..data_prep.fetch import COCO_2017, OFFICIAL_MIRROR, fetch_coco

        fetch_coco(
            options.output,
            mirror=options.mirror or OFFICIAL_MIRROR,
            archives=options.archives,
            only=options.only,
            keep_archives=options.keep_archives,
            table=COCO_2017,
        )
        print(f"{options.output}: complete; the recipes expect its shards from")
        for split in sorted(set(options.only)):
            annotations = options.output / "annotations" / f"instances_{split}2017.json"
            images = options.output / f"{split}2017"
            words = ["convnext-yolo", "shard", "--input", annotations, "--images", images]
            words += ["--output", f"shards/coco/{split}2017"]
            print("  " + shlex.join(map(str, words)))

    parser.set_defaults(run_command=run)


_SHARD_EPILOG = """
--input is for coco the JSON file, for voc the folder of XML files, for yolo the folder of labels.
What can't be right is repaired or left out, and told in report.json beside the shards; --strict
refuses it instead. A run that was ended goes on from there when it is started again.
"""


def _shard(commands: Commands) -> None:
    parser = add_command(commands, "shard", "write a data set as WebDataset shards", _SHARD_EPILOG)
    parser.add_argument(
        "--input", type=Path, required=True, metavar="PATH", help="annotations: a file or folder"
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="their images")
    parser.add_argument("--output", required=True, metavar="DIR|URL", help="new folder, or s3://…")
    parser.add_argument(
        "--format", choices=("coco", "voc", "yolo"), default="coco", help="default coco"
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="voc, yolo: class names, or a data.yaml"
    )
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="voc, yolo: only these images, one a line"
    )
    parser.add_argument("--strict", action="store_true", help="repair nothing, leave nothing out")
    parser.add_argument(
        "--samples-per-shard", type=positive, default=512, metavar="N", help="default 512"
    )
    parser.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes, default 1"
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="for a URL: where shards are written first"
    )

    def run(options: argparse.Namespace) -> None:
        from ..data_prep.findings import REPORT_NAME, Findings
        from ..data_prep.formats import read_dataset
        from ..data_prep.shard import shard_dataset

        dataset = read_dataset(
            options.format,
            options.input,
            options.images,
            options.classes,
            options.list,
            Findings(options.strict),
        )
        manifest, report = shard_dataset(
            dataset,
            options.output,
            options.samples_per_shard,
            options.workers,
            scratch=options.scratch,
        )
        for line in report.summary():
            print(line)
        if report.summary():
            print(f"more in {options.output.rstrip('/')}/{REPORT_NAME}")
        print(
            f"{options.output}: {manifest.samples} samples, {manifest.boxes} boxes, "
            f"{len(manifest.classes)} classes in {len(manifest.shards)} shard(s), "
            f"{manifest.bytes / 1e6:.1f} MB"
        )

    parser.set_defaults(run_command=run)


_VERIFY_EPILOG = """
With --stream it runs the training stream of a recipe over the shards, as that many ranks with that
many loader processes each would, and prints the sha256 of every global batch. The numbers of ranks
and processes change nothing, and --start gives the lines that a run from the first batch gives:
  convnext-yolo verify shards/train --stream --config quickstart --world-size 4 --workers 2
"""


def _verify(commands: Commands) -> None:
    parser = add_command(
        commands, "verify", "re-read and re-hash a folder of shards", _VERIFY_EPILOG
    )
    parser.add_argument("shards", metavar="SHARDS", help="folder with manifest.json")
    parser.add_argument(
        "--workers",
        type=whole_number,
        metavar="N",
        help="processes; default: up to 4, or 1 for a small folder, or the recipe's with --stream",
    )
    parser.add_argument("--images", action="store_true", help="decode every picture as well")
    stream = parser.add_argument_group("the training stream")
    stream.add_argument("--stream", action="store_true", help="print the hashes of its batches")
    stream.add_argument(
        "--config", action="append", metavar="FILE", help="recipe; may be given again"
    )
    stream.add_argument("--world-size", type=positive, metavar="W", help="ranks, default 1")
    stream.add_argument("--batches", type=positive, metavar="K", help="how many, default 10")
    stream.add_argument("--start", type=whole_number, metavar="B", help="first one, default 0")

    def run(options: argparse.Namespace) -> None:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("config", "world_size", "batches", "start")
            if getattr(options, name) is not None
        ]
        if options.stream and not options.config:
            options.parser.error("--stream needs the --config whose batches are wanted")
        if given and not options.stream:
            options.parser.error(f"{given[0]} goes with --stream; add it, or leave {given[0]} out")
        if options.stream:
            _print_stream(options)
        else:
            _print_problems(options)

    parser.set_defaults(run_command=run)


def _print_stream(options: argparse.Namespace) -> None:
    from ..recipes.load import load_recipe, recipe_path
    from ..recipes.stream_proof import stream_digests

    recipe = load_recipe([recipe_path(name) for name in options.config])
    workers = recipe.data.workers if options.workers is None else options.workers
    digests = stream_digests(
        recipe, options.shards, options.world_size or 1, workers, options.start or 0
    )
    for _, (step, digest) in zip(range(options.batches or 10), digests, strict=False):
        print(f"batch {step} {digest}", flush=True)


def _print_problems(options: argparse.Namespace) -> None:
    from ..data_prep.errors import DataError
    from ..data_prep.manifest import Manifest
    from ..data_prep.verify import verify

    if "://" in options.shards:
        raise DataError(
            f"{options.shards}: verify reads folders; every chunk that a run reads from a URL is "
            "checked against its digest, and --stream takes a URL too"
        )
    folder = Path(options.shards)
    problems = verify(folder, options.workers, options.images)
    if problems:
        raise DataError("\n".join(problems))
    manifest = Manifest.load(folder)
    shards = len(manifest.shards)
    decoded = ", every picture decoded" if options.images else ""
    print(f"{options.shards}: {manifest.samples} samples in {shards} shard(s), all good{decoded}")


COMMANDS = (_fetch_coco, _shard, _verify)
