"""A recipe that two ranks train in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from convnext_yolo.data_prep.formats import read_coco
from convnext_yolo.data_prep.shard import shard_dataset

STEPS = 4


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, datasets: Path) -> Path:
    """The bundled cells' validation pictures, and for evaluations the first of them."""
    folder = tmp_path_factory.mktemp("shards")
    cells = read_coco(datasets / "bccd/instances_val.json", datasets / "bccd/images/val")
    shard_dataset(cells, folder / "train", samples_per_shard=30, progress=False)
    # Few: most runs end with an evaluation that no test looks at.
    cells.images[24:] = []
    shard_dataset(cells, folder / "val", samples_per_shard=10, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_shards: Path) -> Callable[..., Path]:
    """Writes a recipe whose run is beside it: `tiny_recipe(folder, **sections)`."""

    def write(folder: Path, **sections: object) -> Path:
        recipe = {
            "run": str(folder / "run"),
            "model": {
                "name": "seed_convnext_yolo",
                "backbone": {"name": "test_convnext"},
                "adapter_channels": [16, 24, 32],
                "neck_channels": [16, 24, 32],
            },
            "data": {
                "train": str(tiny_shards / "train"),
                "val": str(tiny_shards / "val"),
                "image_px": [64, 96],
                "workers": 0,
            },
            "batch": {"global": 8, "micro": 2},
            "schedule": {"epochs": STEPS / 9, "warmup_epochs": 0.1},
            "deepspeed": {"stage": 2},
            "checkpoint": {"every_epochs": 100},
            "evaluation": {"every_epochs": 100},
            "tracking": {"wandb": "off", "log_every": 1},
            **sections,
        }
        path = folder / "recipe.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write
