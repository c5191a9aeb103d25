"""Recipes from files and options, and one sentence for each mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from convnext_yolo.recipes.config import Recipe, RecipeError
from convnext_yolo.recipes.load import load_recipe, recipe_path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to_file(text: str, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


def test_files_stack_key_by_key_and_options_win(write: Callable[..., Path]) -> None:
    first = write("optimizer: {lr: 0.1, name: sgd}\nmodel: {backbone: {options: {depths: [1]}}}")
    second = write("optimizer: {lr: 0.2}\nmodel: {backbone: {options: {dims: [8]}}}", "s.yaml")
    recipe = load_recipe([first, second], ["--optimizer.clip", "3", "--data.image_px=[64, 96]"])
    assert (recipe.optimizer.lr, recipe.optimizer.name, recipe.optimizer.clip) == (0.2, "sgd", 3)
    assert recipe.model.backbone.options == {"depths": [1], "dims": [8]}
    assert recipe.data.image_px == (64, 96)
    assert recipe.batch.global_size == Recipe().batch.global_size  # untouched


def test_a_recipe_written_and_read_is_the_same(write: Callable[..., Path]) -> None:
    recipe = load_recipe([], ["--batch.global", "32", "--deepspeed.options.x", "{y: 1}"])
    again = load_recipe([write(recipe.to_yaml())])
    assert again == recipe
    assert yaml.safe_load(recipe.to_yaml())["batch"] == {
        "global": 32,
        "micro": 16,
        "find_micro": False,
    }


def test_an_empty_file_is_all_defaults(write: Callable[..., Path]) -> None:
    assert load_recipe([write("# nothing\n")]) == Recipe()


def test_names_of_packaged_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path("quickstart").is_file()
    assert recipe_path("some/quickstart") == Path("some/quickstart")
    (tmp_path / "quickstart").write_text("")  # a file of that name goes first
    assert recipe_path("quickstart") == Path("quickstart")


FILE_MISTAKES = {
    "unknown section": ("optimiser: {lr: 1}", ["unknown key optimiser", "did you mean optimizer?"]),
    "unknown key": ("optimizer: {learning: 1}", ["unknown key optimizer.learning", "known here: "]),
    "deep unknown key": ("model: {backbone: {nam: x}}", ["model.backbone.nam", "mean name?"]),
    "wrong type": ("schedule: {epochs: many}", ["schedule.epochs = 'many'", "number"]),
    "out of range": ("optimizer: {lr: -1}", ["optimizer.lr = -1", "greater than 0"]),
    "not a choice": ("optimizer: {name: adam}", ["optimizer.name = 'adam'", "'adamw' or 'sgd'"]),
    "frame": ("data: {image_px: [100, 200]}", ["data.image_px = [100, 200]", "multiples of 32"]),
    "one side": ("data: {image_px: [96]}", ["data.image_px"]),
    "ragged anchors": (
        "model: {name: yolov5, anchors: [[[1, 2]], [[1, 2]], [[1, 2], [3, 4]]]}",
        ["model.anchors", "equally many"],
    ),
    "empty section": ("batch:", ["batch", "None"]),
    "section that is a number": ("batch: 3", ["batch = 3"]),
    "broken YAML": ("run: x\nbatch: {global: 8", ["r.yaml, line", "YAML"]),
    "a list": ("- run", ["r.yaml", "list"]),
}


@pytest.mark.parametrize("case", FILE_MISTAKES)
def test_mistakes_in_files(case: str, write: Callable[..., Path]) -> None:
    text, parts = FILE_MISTAKES[case]
    path = write(text)
    with pytest.raises(RecipeError) as mistake:
        load_recipe([path])
    sentence = str(mistake.value)
    assert "\n" not in sentence
    assert all(part in sentence for part in [str(path), *parts]), sentence


OPTION_MISTAKES = {
    "unknown": (["--optimizer.lrr", "1"], ["--optimizer.lrr: unknown key", "did you mean lr?"]),
    "no value": (["--optimizer.lr"], ["--optimizer.lr", "missing"]),
    "no key": (["0.1"], ["0.1", "--key.sub value"]),
    "not YAML": (["--run", "{"], ["--run", "not YAML"]),
    "below a number": (["--seed.x", "1"], ["--seed.x: seed = {'x': 1}", "integer"]),
}


@pytest.mark.parametrize("case", OPTION_MISTAKES)
def test_mistakes_in_options(case: str) -> None:
    words, parts = OPTION_MISTAKES[case]
    with pytest.raises(RecipeError) as mistake:
        load_recipe([], words)
    assert "\n" not in str(mistake.value)
    assert all(part in str(mistake.value) for part in parts), str(mistake.value)


def test_the_source_of_a_mistake_is_the_file_that_has_it(write: Callable[..., Path]) -> None:
    good, bad = write("optimizer: {clip: 1}"), write("optimizer: {lr: x}", "bad.yaml")
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe([bad, good])
    with pytest.raises(RecipeError, match=r"no such file"):
        load_recipe([good, good.with_name("absent.yaml")])
