"""What a run says of itself: metrics.jsonl, which is the truth, and Weights & Biases beside it."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .config import Recipe
from .files import write_whole


class Tracker:
    """Writes one JSON line a record, and passes it on to W&B. For the main rank only.

    A record has `kind` ("train" or "val"), `step`, `epoch` and numbers by name. The file holds
    each step once: a resumed run first drops what it is going to repeat.
    """

    def __init__(self, recipe: Recipe, folder: Path, step: int, run_id: str | None):
        self.path = folder / "metrics.jsonl"
        keep = [r for r in read_metrics(folder) if r["step"] <= step] if step else []
        write_whole(self.path, "".join(json.dumps(r) + "\n" for r in keep))
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(recipe, folder, run_id)
        self.run_id = self._wandb.id if self._wandb else run_id

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a record; it is on disk when this returns."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._wandb:
            numbers = {
                f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, int | float)
            }
            self._try(self._wandb.log, numbers)

    def close(self) -> None:
        """Ends the W&B run."""
        self._file.close()
        if self._wandb:
            self._try(self._wandb.finish)
        if "wandb" in sys.modules:
            # Else W&B's exit hook does so, with a traceback where a launcher killed its service.
            with contextlib.suppress(Exception):
                sys.modules["wandb"].teardown()

    def _try(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Calls W&B; whatever goes wrong there never stops training."""
        try:
            call(*arguments)
        except Exception as error:
            print(f"W&B stopped: {error}; metrics.jsonl goes on", file=sys.stderr)
            self._wandb = None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run. A last line cut off by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _start_wandb(recipe: Recipe, folder: Path, run_id: str | None) -> Any:
    if recipe.tracking.wandb == "off":
        return None
    # Nothing leaves the machine unless the recipe says so, whatever the environment says.
    os.environ["WANDB_MODE"] = recipe.tracking.wandb
    try:
        import wandb

        return wandb.init(
            project=recipe.tracking.project,
            dir=str(folder),
            id=run_id,
            resume="allow",
            name=folder.name,
            config=recipe.model_dump(mode="json", by_alias=True),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
    except Exception as error:  # a tracker never stops training
        print(
            f"W&B does not start: {error}; metrics.jsonl is written all the same", file=sys.stderr
        )
        return None
