"""What values a recipe takes: traps of YAML, and numbers that would fail later and worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from convnext_yolo.recipes.config import DataSection, Recipe, RecipeError
from convnext_yolo.recipes.config_model import YOLOv5Section
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.optim import build_optimizer


def read(tmp_path: Path, text: str, *options: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe([path], options)


ACCEPTED = {
    "YAML's off is false": ("tracking: {wandb: off}", "tracking.wandb", "off"),
    "off in quotes": ("tracking: {wandb: 'off'}", "tracking.wandb", "off"),
    "1e-3 is a string to YAML": ("optimizer: {lr: 1e-3}", "optimizer.lr", 1e-3),
    "whole floats": ("batch: {micro: 8.0}", "batch.micro", 8),
    "options pass through": (
        "model: {backbone: {options: {depths: [1, 2], conv_mlp: true, act_layer: gelu}}}",
        "model.backbone.options",
        {"depths": [1, 2], "conv_mlp": True, "act_layer": "gelu"},
    ),
    "empty file": ("", "seed", 0),
    "SGD without momentum": ("optimizer: {name: sgd, momentum: 0}", "optimizer.momentum", 0),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(tmp_path, case):
    text, key, expected = ACCEPTED[case]
    value = read(tmp_path, text)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected


REFUSED = {
    "infinite lr": ("optimizer: {lr: .inf}", "optimizer.lr = inf: input should be a finite number"),
    "lr that is not a number": ("optimizer: {lr: .nan}", "optimizer.lr = nan: "),
    "endless": ("schedule: {epochs: .inf}", "schedule.epochs = inf: "),
    "endless batch": ("batch: {global: .inf}", "batch.global = inf: "),
    "beta of 1": ("optimizer: {betas: [1, 0.9]}", "optimizer.betas.0 = 1: input should be less"),
    "momentum of 1": ("optimizer: {momentum: 1}", "optimizer.momentum = 1: input should be less"),
    "key twice": ("seed: 1\noptimizer:\n  lr: 1\n  lr: 2\n", ", line 4: the key lr comes twice; "),
    "section twice": ("batch: {micro: 2}\nbatch: {global: 4}", "line 2: the key batch comes twice"),
    "empty section": ("batch:\n", "batch = None: needs keys below it (global, micro, find_micro)"),
    "section as number": (
        "seed: 1\nbatch: 3",
        "batch = 3: needs keys below it (global, micro, find_micro)",
    ),
    "empty inner section": ("model: {backbone: }", "model.backbone = None: needs keys below it ("),
    "control character": ("run: \x01", "special characters are not allowed"),
    "tab": ("batch:\n\tmicro: 1", ", line 2: found character '\\t'"),
    "two documents": ("---\nseed: 1\n---\nseed: 2", ", line 3: "),
    "Python objects": ("run: !!python/object:os.system ls", "line 1: could not determine"),
    "typo in a nested key": (
        "model: {backbone: {wieghts: x}}",
        "unknown key model.backbone.wieghts; did you mean weights?",
    ),
    "too many sides": ("data: {image_px: [96, 96, 96]}", "data.image_px = [96, 96, 96]: tuple"),
    "half a pixel": ("data: {image_px: [96.5, 96]}", "data.image_px.0 = 96.5: "),
    "small frame": ("data: {image_px: [32, 64]}", "data.image_px = [32, 64]: height and width"),
    "negative anchor": (
        "model: {name: yolov5, anchors: [[[1, -2]], [[1, 2]], [[1, 2]]]}",
        "model.anchors.0.0.1 = -2: ",
    ),
    "unknown detector": (
        "model: {name: yolo99}",
        "model.name = 'yolo99': is not a detector; known",
    ),
    "another detector's key": (
        "model: {name: yolov5, neck_repeats: 1}",
        "unknown key model.neck_repeats; known here: weights, anchors, loss, name, depth, width",
    ),
    "no anchors": (
        "model: {name: yolov5, anchors: [[], [], []]}",
        "model.anchors = [[], [], []]: each of",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(tmp_path, case):
    text, part = REFUSED[case]
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"recipe {tmp_path / 'r.yaml'}")
    assert part in sentence


OPTIONS_REFUSED = {
    "option for a value": (["--run", "--seed", "3"], "option --run: its value is missing"),
    "last value missing": (["--seed", "3", "--run"], "option --run: its value is missing"),
    "empty value": (["--seed="], "--seed: seed = None: "),
    "only dashes": (["--", "1"], "option --: expected --key.sub value"),
    "section as value": (["--batch", "3"], "--batch: batch = 3: needs keys below it"),
    "empty part": (["--batch..micro", "3"], "--batch..micro: unknown key batch."),
}


@pytest.mark.parametrize("case", OPTIONS_REFUSED)
def test_options_refused(case):
    words, part = OPTIONS_REFUSED[case]
    with pytest.raises(RecipeError) as error:
        load_recipe([], words)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_option_values():
    words = ["--run=--odd", "--tracking.wandb", "off", "--schedule.warmup_epochs", "0"]
    recipe = load_recipe([], [*words, "--optimizer", "{lr: 3}", "--optimizer.clip=1e-2"])
    assert (recipe.run, recipe.tracking.wandb, recipe.schedule.warmup_epochs) == ("--odd", "off", 0)
    assert (recipe.optimizer.lr, recipe.optimizer.clip) == (3, 0.01)


def test_a_folder_or_bytes_are_no_recipe(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, binary):
        with pytest.raises(RecipeError) as error:
            load_recipe([path])
        assert str(error.value).startswith(f"recipe {path}: can't be read (")
        assert "\n" not in str(error.value)


def test_a_mistake_names_the_last_file_that_set_the_key(tmp_path):
    texts = {"base": "batch: {global: 0}", "good": "batch: {micro: 1}", "last": "seed: -1"}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [tmp_path / f"{name}.yaml" for name in texts]
    with pytest.raises(RecipeError, match=r"base.yaml: batch.global = 0: "):
        load_recipe(files[:2])
    with pytest.raises(RecipeError, match=r"--batch.global: batch.global = -4: "):
        load_recipe(files[:2], ["--batch.global", "-4"])
    with pytest.raises(RecipeError, match=r"last.yaml: seed = -1: "):
        load_recipe([files[1], files[2]])


def test_files_are_not_mixed_up_by_stacking(tmp_path):
    """Merging must not write into what another load reads."""
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("deepspeed: {options: {a: {b: 1}}}")
    two.write_text("deepspeed: {options: {a: {c: 2}}}")
    for _ in range(2):
        assert load_recipe([one, two]).deepspeed.options == {"a": {"b": 1, "c": 2}}
    assert load_recipe([two]).deepspeed.options == {"a": {"c": 2}}
    assert Recipe().deepspeed.options == {}


def test_every_section_survives_the_round_trip(tmp_path):
    recipe = Recipe(
        run="2024-01-01",
        seed=2**40,
        model=YOLOv5Section(name="yolov5", anchors=(((1.5, 2),), ((3, 4),), ((5, 6),))),
        data=DataSection(image_px=(64, 96), train="off"),
        tracking={"wandb": "off", "project": "no"},
    )
    assert read(tmp_path, recipe.to_yaml()) == recipe
    keys = yaml.safe_load(recipe.to_yaml())
    assert list(keys) == list(Recipe.model_fields)
    assert read(tmp_path, Recipe().to_yaml()) == Recipe()


def test_the_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3


def test_plain_sgd_is_built():
    """torch refuses Nesterov without momentum."""
    import torch

    options = load_recipe([], ["--optimizer", "{name: sgd, momentum: 0}"]).optimizer
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer = build_optimizer(model, options, 1)  # type: ignore[arg-type]
    assert isinstance(optimizer, torch.optim.SGD)
