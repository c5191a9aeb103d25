"""`make compare` takes up what it finds: finished runs stay, others go on or begin anew."""

from __future__ import annotations

from pathlib import Path

from convnext_yolo.launch import compare
from convnext_yolo.recipes import resume
from convnext_yolo.recipes.load import load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


def test_elsewhere_than_in_the_repository_it_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.main() == 2
    assert "run it in the repository's root" in capsys.readouterr().err


def test_a_run_is_begun_gone_on_with_begun_anew_or_left(tmp_path, monkeypatch) -> None:
    run = tmp_path / "ours-1"
    [command] = compare._training(RECIPE, 1, run)
    assert f"--resume never --seed 1 --run {run}" in command
    run.mkdir()
    recipe = load_recipe([RECIPE], ["--seed", "1", "--run", str(run), *compare.KEYS])
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    [command] = compare._training(RECIPE, 1, run)
    assert "--resume auto" in command
    monkeypatch.setattr(resume, "is_finished", lambda wanted: wanted == recipe)
    assert compare._training(RECIPE, 1, run) == []
    other = load_recipe([RECIPE], ["--seed", "1", "--run", str(run), "--optimizer.lr", "0.1"])
    (run / "recipe.yaml").write_text(other.to_yaml())
    [command] = compare._training(RECIPE, 1, run)
    assert "--resume never" in command


def test_its_recipes_differ_in_the_design_alone() -> None:
    study, ours = (
        load_recipe([RECIPE.parent / compare.RECIPES[design].name], [*compare.KEYS, "--run", "r"])
        for design in ("study", "ours")
    )
    assert (study.model.name, ours.model.name) == ("seed_convnext_yolo", "convnext_yolo")
    assert study.model.backbone == ours.model.backbone
    assert study.model_dump(exclude={"model"}) == ours.model_dump(exclude={"model"})
