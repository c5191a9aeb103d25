"""The built wheel: what is in it, what it asks for, and that it works without the repository."""

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path
from shutil import copy2

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "data_prep", "recipes", "launch", "demo")


@pytest.fixture(scope="session")
def project_files(component: Callable[[str], Path]) -> list[str]:
    """Files that are, or would be, committed; relative to the repository."""
    # safe.directory: in a CI container the checkout may belong to another user
    command = [component("git"), "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    which = ["--cached", "--others", "--exclude-standard"]
    listed = subprocess.run([*command, *which], cwd=ROOT, capture_output=True, check=True)
    names = listed.stdout.decode().rstrip("\0").split("\0")
    return sorted(name for name in set(names) if (ROOT / name).is_file())


@pytest.fixture(scope="session")
def wheel(project_files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of those files alone, so that no left-over of the working tree gets into it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in project_files:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy2(ROOT / name, target)
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="session")
def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="session")
def metadata(wheel: Path, contents: list[str]) -> Message:
    (name,) = fnmatch_all(contents, "*.dist-info/METADATA")
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


def fnmatch_all(names: list[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatch(name, pattern)]


def _run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.process
@pytest.mark.parametrize("pattern", ["recipes/*.yaml", "demo/assets/*", "launch/templates/*"])
def test_wheel_holds_the_data_files(
    pattern: str, project_files: list[str], contents: list[str]
) -> None:
    expected = {f"convnext_yolo/{name}" for name in fnmatch_all(project_files, pattern)}
    if not expected and not pattern.startswith("recipes"):
        pytest.skip(f"the project has no {pattern} yet")
    assert expected
    assert expected <= set(contents)


@pytest.mark.process
def test_wheel_holds_nothing_else(project_files: list[str], contents: list[str]) -> None:
    modules = {f"convnext_yolo/{n}" for r in ROOMS for n in fnmatch_all(project_files, f"{r}/*.py")}
    assert modules == set(fnmatch_all(contents, "*.py"))
    assert {f"convnext_yolo/{room}/py.typed" for room in ROOMS} <= set(contents)
    assert not [name for name in contents if "/datasets/" in name or name.startswith("tests/")]


@pytest.mark.process
def test_wheel_states_its_licence(contents: list[str], metadata: Message) -> None:
    assert fnmatch_all(contents, "*.dist-info/licenses/LICENSE")
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.process
def test_only_the_train_extra_asks_for_deepspeed(metadata: Message) -> None:
    requirements = metadata.get_all("Requires-Dist") or []
    assert any(r.startswith("gradio") and 'extra == "demo"' in r for r in requirements)
    asks = [r for r in requirements if re.match("deepspeed|accelerate|wandb", r)]
    assert asks and all('extra == "train"' in r for r in asks)


@pytest.mark.process
def test_wheel_imports_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    _run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
        cwd=tmp_path,
    )
    script = f"""
import importlib, pathlib, pkgutil, sys
# in front of the finder of the editable install, which would give the repository's modules
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
sys.path.insert(0, {str(site)!r})
for room in {ROOMS!r}:
    package = importlib.import_module("convnext_yolo." + room)
    assert pathlib.Path(package.__file__).is_relative_to({str(site)!r}), package.__file__
"""
    _run("-c", script, cwd=tmp_path)


@pytest.mark.process
def test_command_line_imports_no_heavy_library(tmp_path: Path) -> None:
    """`--help` answers in under a second only if subcommands import inside their functions."""
    heavy = {"torch", "timm", "gradio", "deepspeed", "cv2", "webdataset", "wandb", "matplotlib"}
    script = "import sys, convnext_yolo.launch.cli; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = set(_run("-c", script, cwd=tmp_path).split())
    assert not loaded & heavy


def test_no_file_names_a_machine(project_files: list[str]) -> None:
    """Paths of one machine work for one person only."""
    machine_path = re.compile(rb"(?<![\w.~*}-])/(?:work|root|home/\w+|Users/\w+)/")
    found = []
    for name in project_files:
        content = (ROOT / name).read_bytes()
        if b"\0" in content or name == "tests/test_packaging.py":  # a picture, or this pattern
            continue
        found += [
            f"{name}:{number}: {line.strip().decode(errors='replace')[:80]}"
            for number, line in enumerate(content.splitlines(), 1)
            if machine_path.search(line)
        ]
    assert not found, "\n".join(found)


def test_component_missing_fails_under_ci_and_skips_elsewhere(
    component: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        component("chromium")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        component("chromium")
