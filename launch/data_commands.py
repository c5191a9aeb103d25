"""Commands about data: shard, verify."""

import argparse
from pathlib import Path

from .parser import Commands, add_command, positive


def _shard(commands: Commands) -> None:
    parser = add_command(commands, "shard", "write a COCO-format data set as WebDataset shards")
    parser.add_argument("--input", type=Path, required=True, metavar="JSON", help="annotations")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="their images")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--samples-per-shard", type=positive, default=512, metavar="N", help="default 512"
    )
    parser.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes, default 1"
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


def _verify(commands: Commands) -> None:
    parser = add_command(commands, "verify", "re-read and re-hash a folder of shards")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder with manifest.json")

    def run(options: argparse.Namespace) -> None:
        from ..data_prep.errors import DataError
        from ..data_prep.manifest import Manifest
        from ..data_prep.verify import verify

        problems = verify(options.shards)
        if problems:
            raise DataError("\n".join(problems))
        manifest = Manifest.load(options.shards)
        shards = len(manifest.shards)
        print(f"{options.shards}: {manifest.samples} samples in {shards} shard(s), all good")

    parser.set_defaults(run_command=run)


COMMANDS = (_shard, _verify)
