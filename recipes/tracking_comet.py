"""Comet. Offline, each session is an archive in RUN/comet, for `comet upload`.

An archive is complete when the session ends in peace. Of one that was killed nothing stays but an
empty archive; the next session holds its records too.
"""

import contextlib
import importlib
import json
import os
import secrets
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Recipe
from .trackers import FINISH_LIMIT_S, Key, Record, columns, numbers


def new_id() -> str:
    """A key for a new experiment."""
    return secrets.token_hex(16)


def load(recipe: Recipe) -> None:
    """Imports all that is going to be needed; raises ImportError."""
    # Of what it would do by itself only what is asked for; and no waiting for hours.
    os.environ["COMET_DISABLE_AUTO_LOGGING"] = "1"
    os.environ["COMET_ERROR_TRACKING_ENABLE"] = "false"
    os.environ["COMET_LOGGING_CONSOLE"] = "ERROR"
    for name in ("COMET_TIMEOUT_CLEANING", "COMET_TIMEOUT_UPLOAD"):
        os.environ.setdefault(name, str(int(FINISH_LIMIT_S)))
    from PIL import Image

    importlib.import_module("comet_ml")
    Image.preinit()
    with contextlib.suppress(ImportError):
        importlib.import_module("pandas")  # Comet's tables do so, where it is installed


class Comet:
    """An experiment of Comet, see `Backend`."""

    def __init__(self, recipe: Recipe, folder: Path, run_id: str):
        self.run_id, self.archives = run_id, folder / "comet"
        self.is_offline = recipe.tracking.comet == "offline"
        comet_ml: Any = importlib.import_module("comet_ml")  # it need not be installed

        self.archives.mkdir(exist_ok=True)
        config = comet_ml.ExperimentConfig(
            name=folder.name,
            offline_directory=str(self.archives),
            auto_output_logging=False,
            log_code=False,
            log_env_details=False,
            log_git_metadata=False,
            log_git_patch=False,
            parse_args=False,
            display_summary_level=0,
        )
        self.experiment = comet_ml.start(
            experiment_key=run_id,
            online=not self.is_offline,
            mode="get_or_create",
            project_name=recipe.tracking.project,
            experiment_config=config,
        )
        self.experiment.log_parameters(recipe.model_dump(mode="json", by_alias=True))

    def held(self, records: Sequence[Record]) -> set[Key]:
        if not self.is_offline:  # a point that is sent again lies upon the first
            return {(r["kind"], r["step"]) for r in records}
        held = set()
        for archive in self.archives.glob(f"{self.run_id}-*.zip"):
            with zipfile.ZipFile(archive) as file:
                is_whole = "messages.json" in file.namelist()
                lines = file.read("messages.json").splitlines() if is_whole else []
            for message in map(json.loads, lines):
                if message["type"] == "metric_msg":
                    metric = message["payload"]["metric"]
                    held.add((metric["metricName"].split("/")[0], metric["step"]))
        return held

    def log(self, record: Record) -> None:
        self.experiment.log_metrics(numbers(record), step=record["step"])

    def table(self, name: str, rows: Sequence[Record], step: int) -> None:
        head = columns(rows)
        data = [[row[c] for c in head] for row in rows]
        self.experiment.log_table(f"{name}-{step}.csv", data, headers=head)

    def picture(self, name: str, path: Path, step: int) -> None:
        self.experiment.log_image(str(path), name=name, step=step)

    def artifact(self, path: Path) -> None:
        self.experiment.log_model("weights", str(path))

    def close(self) -> None:
        self.experiment.end()
