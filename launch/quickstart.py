"""`make quickstart`: the whole job once, on bundled data: shard, train, export, evaluate, report.

Each stage is a command that a user can type; a stage whose results are there already is skipped.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .cli import main as convnext_yolo

DATA = Path("data_prep/datasets/bccd")
RECIPE = Path("recipes/quickstart.yaml")
RUN = Path("runs/quickstart")
WEIGHTS = RUN / "model.safetensors"
CPU_PROCESSES = 2  # without a GPU: the smallest world that has anything to shard


@dataclass(frozen=True)
class Stage:
    """A step of the quickstart."""

    title: str
    commands: list[str]
    outputs: list[Path]
    is_done: Callable[[], bool]


def main() -> int:
    """Runs the stages; returns the exit code of the first that fails, or 0."""
    if not data_is_here("quickstart"):
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
    started_s = time.monotonic()
    all_stages = stages()
    for number, stage in enumerate(all_stages, 1):
        print(f"\n[{number}/{len(all_stages)}] {stage.title}", flush=True)
        code = _run(stage)
        if code:
            print("quickstart: stopped; start it again to go on from here", file=sys.stderr)
            return code
    minutes, seconds = divmod(int(time.monotonic() - started_s), 60)
    print(f"\nAll of it took {minutes} min {seconds:02d} s. Open the demo with:\n")
    print(f"    {Path(sys.executable).with_name('convnext-yolo')} demo --weights {WEIGHTS}\n")
    return 0


def stages() -> list[Stage]:
    """What the quickstart does, in order."""
    results, figures = RUN / "results.json", [RUN / "curves.png", RUN / "predictions.png"]
    return [
        Stage(
            "Shard the bundled pictures (BCCD blood cells: 292 to train on, 72 to validate)",
            shard_commands(),
            [RUN / "shards/train", RUN / "shards/val"],
            lambda: False,
        ),
        Stage(
            "Train from scratch under the DeepSpeed launcher",
            [f"launch local --config {RECIPE}{processes()}"],
            [RUN / "recipe.yaml", RUN / "metrics.jsonl", RUN / "checkpoints"],
            _is_trained,
        ),
        Stage(
            "Export the averaged weights to one file",
            [f"export {RUN} --output {WEIGHTS}"],
            [WEIGHTS],
            lambda: _is_newer(WEIGHTS, RUN / "checkpoints/latest"),
        ),
        Stage(
            "Evaluate them with pycocotools",
            # square, as the run itself evaluates
            [
                f"eval --weights {WEIGHTS} --data {RUN}/shards/val --letterbox square "
                f"--output {results}"
            ],
            [results],
            lambda: _is_newer(results, WEIGHTS),
        ),
        Stage(
            "Draw the curves, and predictions beside ground truth",
            [f"report {RUN} --output {RUN}"],
            figures,
            lambda: all(_is_newer(figure, WEIGHTS) for figure in figures),
        ),
    ]


def data_is_here(program: str) -> bool:
    """Whether this is the repository's root; says so where it is not."""
    if DATA.is_dir() and RECIPE.is_file():
        return True
    print(f"{program}: no {DATA} here; run it in the repository's root", file=sys.stderr)
    return False


def shard_commands() -> list[str]:
    """Shards the bundled data; a command sees when there is nothing to do."""
    return [
        f"shard --input {DATA}/instances_{split}.json --images {DATA}/images/{split} "
        f"--output {RUN}/shards/{split} --samples-per-shard 64"
        for split in ("train", "val")
    ]


def processes() -> str:
    """An option of `launch local`: without a GPU, two."""
    import torch

    return "" if torch.cuda.is_available() else f" --processes {CPU_PROCESSES}"


def _run(stage: Stage) -> int:
    started_s = time.monotonic()
    is_done = stage.is_done()
    for command in [] if is_done else stage.commands:
        print(f"$ convnext-yolo {command}", flush=True)
        code = convnext_yolo(shlex.split(command))
        if code:
            return code
    how = "there already" if is_done else f"took {time.monotonic() - started_s:.1f} s"
    print(f"{how}: {', '.join(map(str, stage.outputs))}", flush=True)
    return 0


def _is_trained() -> bool:
    from ..recipes.load import load_recipe
    from ..recipes.resume import is_finished

    return is_finished(load_recipe([RECIPE]))


def _is_newer(path: Path, than: Path) -> bool:
    return path.exists() and than.exists() and path.stat().st_mtime >= than.stat().st_mtime


if __name__ == "__main__":
    sys.exit(main())
