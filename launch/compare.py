"""`make compare`: the study's design against ours on bundled data, two seeds of each.

Same pictures, trunk, epochs, augmentation and optimizer; what differs is neck, head, assignment
and losses. Shorter than the quickstart, so that neither has learnt all there is to learn: COCO
in 50 epochs is more like that. A run that is finished is not repeated, one that was interrupted
goes on.
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
KEYS = ["--schedule.epochs", "30", "--augment.weak_epochs", "5"]


def main() -> int:
    """Trains them all, then writes tables and figures; returns an exit code."""
    if not data_is_here("compare"):
        return 2
    started_s = time.monotonic()
    commands = shard_commands()
    for seed in SEEDS:  # a run of each design in turn, so that both have the machine as it is
        for design, recipe in RECIPES.items():
            commands += _training(recipe, seed, OUTPUT / f"{design}-{seed}")
    for number, command in enumerate(commands, 1):
        print(f"\n[{number}/{len(commands)}] $ convnext-yolo {command}", flush=True)
        code = convnext_yolo(shlex.split(command))
        if code:
            print("compare: stopped; start it again to go on from here", file=sys.stderr)
            return code
    from ..recipes.compare import compare

    runs = {design: [OUTPUT / f"{design}-{seed}" for seed in SEEDS] for design in RECIPES}
    print(f"\n{compare(runs, OUTPUT)}\n\nwritten to {OUTPUT}/compare.md and compare.png")
    minutes, seconds = divmod(int(time.monotonic() - started_s), 60)
    print(f"\nAll of it took {minutes} min {seconds:02d} s")
    return 0


def _training(recipe: Path, seed: int, run: Path) -> list[str]:
    """The command that trains it; none if it is finished, afresh if its recipe was another."""
    from ..recipes.load import load_recipe
    from ..recipes.resume import is_finished

    options = ["--seed", str(seed), "--run", str(run), *KEYS]
    wanted = load_recipe([recipe], options)
    before = run / "recipe.yaml"
    same = before.is_file() and before.read_text(encoding="utf-8") == wanted.to_yaml()
    if same and is_finished(wanted):
        print(f"there already: {run}")
        return []
    resume = "auto" if same else "never"
    return [f"launch local --config {recipe}{processes()} --resume {resume} {shlex.join(options)}"]


if __name__ == "__main__":
    sys.exit(main())
