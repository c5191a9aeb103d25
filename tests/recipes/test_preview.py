"""`preview`: what it draws is what training takes, and its statistics are exact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.formats import read_coco
from convnext_yolo.data_prep.loader import training_batches
from convnext_yolo.data_prep.reader import ShardReader
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.data_prep.stream import BatchPlan
from convnext_yolo.launch.cli import main
from convnext_yolo.recipes.config import Recipe
from convnext_yolo.recipes.data import training_stream
from convnext_yolo.recipes.figures import ReportError
from convnext_yolo.recipes.preview import augmented_samples, preview

# Image id: width and height; its boxes in xywh with their class, crowds marked.
PICTURES: dict[int, tuple[tuple[int, int], list[tuple[list[float], int, bool]]]] = {
    1: ((64, 64), [([0, 0, 8, 8], 1, False), ([10, 10, 16, 4], 1, False)]),
    2: ((128, 64), [([0, 0, 64, 64], 2, False), ([1, 1, 100, 50], 1, True)]),
    3: ((64, 64), []),
    4: ((32, 32), [([4, 4, 25, 25], 1, False)]),
}


@pytest.fixture(autouse=True)
def no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its global state keeps figures for ever and is not safe under threads."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """`PICTURES` in shards; a third class has no box."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    images, annotations = [], []
    for number, ((width, height), boxes) in PICTURES.items():
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        )
        for box, category, crowd in boxes:
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category}
                | {"bbox": box, "iscrowd": int(crowd)}
            )
    names = ("dot", "pl$at_e", "none")
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(document))
    dataset = read_coco(tmp_path / "instances.json", folder)
    shard_dataset(dataset, tmp_path / "shards", samples_per_shard=2, progress=False)
    return tmp_path / "shards"


def recipe_of(shards: Path, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"train": str(shards), "image_px": [128, 128]},
            "batch": {"global": 4, "micro": 2},
            **sections,
        }
    )


def test_statistics_are_exact(shards, tmp_path, capsys):
    file = tmp_path / "new" / "statistics.json"
    statistics = preview(recipe_of(shards), tmp_path / "p.png", samples=1, json_file=file)
    # Fitted into 128 x 128: twice, once, twice and four times as large.
    assert sorted(statistics.sides_px.tolist()) == [16, 16, 64, 100]
    assert statistics.size_counts() == {"small": 2, "medium": 1, "large": 1}
    document = json.loads(file.read_text())
    assert document == statistics.document()
    assert {key: document[key] for key in ("pictures", "empty_pictures", "boxes", "crowds")} == {
        "pictures": 4,
        "empty_pictures": 1,
        "boxes": 4,
        "crowds": 1,
    }
    assert document["unreadable_samples"] == 0
    assert document["classes"] == [
        {"id": 1, "name": "dot", "boxes": 3, "pictures": 2},
        {"id": 2, "name": "pl$at_e", "boxes": 1, "pictures": 1},
        {"id": 3, "name": "none", "boxes": 0, "pictures": 0},
    ]
    assert document["box_side_px"]["percentiles"]["50"] == 40
    assert document["boxes_per_picture"]["mean"] == 1
    assert document["boxes_per_picture"]["max"] == 2
    table = statistics.table()
    assert "4 pictures (1 without boxes), 4 boxes of 3 classes, 1 crowds" in table
    assert "2 small, 1 medium, 1 large" in table
    assert capsys.readouterr().err == ""  # a bar is for what takes longer


def test_samples_are_those_of_training(tiny_shards):
    recipe = recipe_of(
        tiny_shards / "train",
        data={"train": str(tiny_shards / "train"), "image_px": [64, 96]},
        batch={"global": 8, "micro": 2},
        seed=3,
    )
    reader = ShardReader(tiny_shards / "train")
    shown = augmented_samples(recipe, reader, 13, step=5)  # the whole batch, and some of the next
    # As two ranks train it: the first micro-batch of each step belongs to the first rank.
    for rank, first in ((0, 0), (1, 2)):
        plan = BatchPlan(global_batch=8, micro_batch=2, rank=rank, world_size=2)
        batches = training_batches(training_stream(recipe, reader, plan, 5), workers=0)
        for start in (first, first + 4, first + 8):
            batch = next(batches)
            for i, image in enumerate(batch.images):
                mine = batch.image_index == i
                sample = shown[start + i]
                assert torch.equal(image, torch.from_numpy(sample.image))
                assert torch.equal(batch.boxes_xyxy[mine], torch.from_numpy(sample.boxes_xyxy))
                assert torch.equal(batch.labels[mine], torch.from_numpy(sample.labels))
                assert batch.image_ids[i] == sample.image_id
    assert len(shown) == 13


def test_the_figure(shards, tmp_path, monkeypatch):
    figures: list[Figure] = []
    savefig = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        savefig(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    output = tmp_path / "new" / "preview.png"
    preview(recipe_of(shards), output, samples=3)
    picture = imread(output)[..., :3]
    assert picture.shape[1] == 1800 and picture.std() > 0.05
    assert [path.name for path in output.parent.iterdir()] == ["preview.png"]
    (figure,) = figures
    samples, charts = figure.axes[:3], figure.axes[3:]
    shown = augmented_samples(recipe_of(shards), ShardReader(shards), 3, 0)
    for axes, sample in zip(samples, shown, strict=True):
        assert np.array_equal(axes.images[0].get_array(), sample.image)
        assert len(axes.artists or axes.patches) == 2 * len(sample.labels)  # and their white rims
    titles = [axes.get_title() for axes in charts]
    assert titles == ["Boxes of each class", "Size of boxes in the frame", "Crowding"]
    assert [bar.get_width() for bar in charts[0].patches] == [3, 1, 0]
    assert [bar.get_height() for bar in charts[2].patches] == [1, 2, 1]
    assert sum(bar.get_height() for bar in charts[1].patches) == 4


def test_the_same_seed_gives_the_same_picture(shards, tmp_path):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        preview(recipe_of(shards, seed=seed), tmp_path / f"{name}.png", samples=2)
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_many_classes_and_no_boxes(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    categories = [{"id": i, "name": f"class {i}"} for i in range(40)]
    document = {
        "images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}],
        "annotations": [],
        "categories": categories,
    }
    (tmp_path / "instances.json").write_text(json.dumps(document))
    dataset = read_coco(tmp_path / "instances.json", tmp_path)
    shard_dataset(dataset, tmp_path / "shards", progress=False)
    recipe = recipe_of(tmp_path / "shards", batch={"global": 1, "micro": 1})
    statistics = preview(recipe, tmp_path / "p.png", samples=1)
    assert imread(tmp_path / "p.png").std() > 0.05
    assert "root of area none" in statistics.table()
    assert "… 29 classes" in statistics.table()


def test_samples_that_can_not_be_read_are_counted(shards, tmp_path):
    path = shards / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"labels"', b'"babels"', 1))
    statistics = preview(recipe_of(shards), tmp_path / "p.png", samples=1)
    assert (statistics.pictures, statistics.unreadable) == (3, 1)
    assert "1 samples can't be read: see `convnext-yolo verify`" in statistics.table()


def test_mistakes_are_one_sentence_and_leave_nothing(shards, tmp_path):
    recipe, output = recipe_of(shards), tmp_path / "out" / "p.png"
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ReportError, r"p\.jpg: only \.png can be written", {"output": tmp_path / "out/p.jpg"}),
        (ReportError, "--samples 0: give a number from 1 to 64", {"samples": 0}),
        (ReportError, "--samples 65: give a number", {"samples": 65}),
        (ReportError, "--step -1: training has 50 steps; give 0 to 49", {"step": -1}),
        (ReportError, "--step 50: training has 50 steps", {"step": 50}),
        (DataError, "nowhere: no such shard folder", {"recipe": recipe_of(tmp_path / "nowhere")}),
        (
            DataError,
            "batch.global is 8, but the training shards hold 4",
            {"recipe": recipe_of(shards, batch={"global": 8, "micro": 2})},
        ),
    ]
    for kind, message, changed in cases:
        with pytest.raises(kind, match=message) as caught:
            preview(**{"recipe": recipe, "output": output, **changed})
        assert "\n" not in str(caught.value)
    assert not output.parent.exists()
    output.parent.write_text("a file")
    with pytest.raises(ReportError, match=r"p\.png: can't be written"):
        preview(recipe, output)
    assert output.parent.read_text() == "a file"


def test_the_command(shards, tmp_path, capsys):
    words = ["preview", "--config", "quickstart", "--samples", "2", "--json", tmp_path / "s.json"]
    words += ["--data.train", shards, "--batch.global", "4", "--batch.micro", "4"]
    assert main([str(word) for word in (*words, "--output", tmp_path / "p.png")]) == 0
    output = capsys.readouterr().out
    assert "4 pictures" in output and output.endswith(f"{tmp_path / 'p.png'}\n{tmp_path}/s.json\n")
    assert main([str(word) for word in (*words, "--output", tmp_path / "p.gif")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convnext-yolo preview: error: figure ") and error.count("\n") == 1
