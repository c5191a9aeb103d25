"""Every command of the README: run where it says so, else held against what it names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from convnext_yolo.launch.cli import main
from convnext_yolo.launch.commands import build_parser
from convnext_yolo.recipes.config import Recipe
from convnext_yolo.recipes.load import load_recipe, recipe_path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(<!-- test: run -->\n)?```sh\n(.*?)```", README, re.S)
LINES = [
    line.split(" #")[0].strip()
    for is_run, block in BLOCKS
    if not is_run
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.process
@pytest.mark.timeout(600)
def test_blocks_that_run(tmp_path: Path) -> None:
    """One after the other, as a reader would, in the repository's root."""
    for name in ("data_prep", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "".join(block for is_run, block in BLOCKS if is_run)
    assert script.count("convnext-yolo") == 11
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-eux", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resuming at step 8 of 12" in result.stdout
    for name in ("mine.safetensors", "results.json", "figures/curves.png", "runs/mine/recipe.yaml"):
        assert (tmp_path / name).is_file()
    assert (tmp_path / "preview.png").is_file()
    assert re.findall(r"^batch (\d) [0-9a-f]{64}$", result.stdout, re.M) == ["0", "1", "2"]
    printed = re.search(r"^.*deepspeed --hostfile .*$", result.stdout, re.M)
    assert printed
    # What is printed has in it what the README gives to copy, but for paths.
    shown = next(line for line in LINES if line.startswith("deepspeed"))
    words = iter(Path(word).name for word in shlex.split(printed[0]))
    assert all(Path(word).name in words for word in shlex.split(shown))


@pytest.mark.parametrize("line", LINES)
def test_other_lines(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[0]}:", makefile, re.M)
        return
    if program != "convnext-yolo":  # a launcher: what follows the module is our command line
        assert "convnext_yolo.launch" in words
        words = words[words.index("convnext_yolo.launch") + 1 :]
    options, rest = build_parser().parse_known_args(words)
    if "config" in options:
        monkeypatch.chdir(ROOT)
        load_recipe([recipe_path(name) for name in options.config], rest)
    if words[0] == "launch":
        monkeypatch.chdir(tmp_path)
        Path("hostfile").write_text("node1 slots=2\nnode2 slots=2\n")
        assert main([*words, "--dry-run"]) == 0
        assert words[1].replace("local", "deepspeed") in capsys.readouterr().out


def test_recipe_keys_are_those_of_the_recipe() -> None:
    """The table names every section, and every key of the smaller ones."""
    table = README[README.index("## Recipe keys") : README.index("| recipe | for |")]
    for name, section in Recipe.model_fields.items():
        assert f"`{name}`" in table
        keys = getattr(section.annotation, "model_fields", {})
        for key, field in keys.items():
            if name != "model":
                assert f"`{field.alias or key}`" in table, f"{name}.{key}"


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_packaged_recipes_load_and_are_listed() -> None:
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        load_recipe([path])
        assert f"[{path.stem}](recipes/{path.name})" in README
