"""`make compare`: the study's design against ours on bundled data, two seeds of each.

Same pictures, trunk, epochs, augmentation and optimizer; what differs is neck, head, assignment
and losses. A run that is finished is not repeated, one that was interrupted goes on.
"""

import shlex
import sys
import time
from pathlib import Path

from .cli import main as convnext_yolo
from .quickstart import data_is_here, processes, shard_commands

RECIPES = {"study": Path("recipes/quickstart_seed.yaml"), "ours": Path("recipes/quickstart.yaml")}
SEEDS = (0, 1)
OUTPUT = Path("runs/compare")


def main() -> int:
    """Trains the four, then writes the table and the figure; returns an exit code."""
    if not data_is_here("compare"):
        return 2
    started_s = time.monotonic()
    runs = {design: [OUTPUT / f"{design}-{seed}" for seed in SEEDS] for design in RECIPES}
    commands = shard_commands()
    for seed in SEEDS:  # a design each in turn, so that both have the machine as it is
        commands += [
            f"launch local --config {recipe} --seed {seed} --run {OUTPUT}/{design}-{seed}"
            f"{processes()}"
            for design, recipe in RECIPES.items()
        ]
    for number, command in enumerate(commands, 1):
        print(f"\n[{number}/{len(commands)}] $ convnext-yolo {command}", flush=True)
        code = convnext_yolo(shlex.split(command))
        if code:
            print("compare: stopped; start it again to go on from here", file=sys.stderr)
            return code
    from ..recipes.compare import compare

    print(f"\n{compare(runs, OUTPUT)}")
    minutes, seconds = divmod(int(time.monotonic() - started_s), 60)
    print(f"\nAll of it took {minutes} min {seconds:02d} s; written to {OUTPUT}/compare.md, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
