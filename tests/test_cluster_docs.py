"""What docs/cluster.md and docs/training.md say is so: commands, messages, numbers, links."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from convnext_yolo.launch import elastic
from convnext_yolo.launch.cli import main
from convnext_yolo.launch.commands import build_parser
from convnext_yolo.launch.finished import main as finished
from convnext_yolo.launch.job import HANDED_ON
from convnext_yolo.launch.supervision import front, lifeline, stall
from convnext_yolo.recipes.load import load_recipe, recipe_path

ROOT = Path(__file__).resolve().parents[1]
CLUSTER, TRAINING = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("cluster.md", "training.md")
)
LINES = [
    line.partition(" #")[0].strip()
    for text in (CLUSTER, TRAINING)
    for block in re.findall(r"```sh\n(.*?)```", text, re.S)
    for line in block.replace("\\\n", " ").splitlines()
]
OURS = [line for line in LINES if "convnext-yolo " in line and not line.startswith("docker")]
LAPTOP = "/tmp/convnext-yolo-cluster/hostfile"
# The rows of the tables by symptom: cell, cell, cell.
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in CLUSTER[CLUSTER.index("## When it fails") :].splitlines()
    if line.startswith("| ") and not line.startswith("| symptom")
]
MESSAGES = sorted({quote for row in ROWS for quote in re.findall(r"`([^`]+)`", row[0])})


def words_of(line: str) -> list[str]:
    """The words after `convnext-yolo`."""
    words = shlex.split(line)
    return words[next(i for i, word in enumerate(words) if word.endswith("convnext-yolo")) + 1 :]


@pytest.mark.parametrize("line", OURS)
def test_commands_parse_and_name_recipes_and_their_keys(line: str) -> None:
    options, rest = build_parser().parse_known_args(words_of(line))
    assert not rest or options.takes_recipe_keys
    load_recipe([recipe_path(name) for name in options.config], rest)


@pytest.mark.parametrize("line", [line for line in OURS if " launch " in line])
def test_launches_can_be_rendered(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the hostfile of the text, batches and all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(elastic, "own_address", lambda host, port: "10.1.0.2")
    [text] = re.findall(r"^printf '(.*)' > hostfile$", CLUSTER, re.M)
    (tmp_path / "hostfile").write_text(text.replace("\\n", "\n"))
    laptop = tmp_path / "laptop"  # as the cluster of tests/cluster writes it
    laptop.write_text("nodeA slots=1\nnodeB slots=1\n")
    words = [w.replace(LAPTOP, str(laptop)) for w in words_of(line)]
    assert main([*words, "--dry-run"]) == 0
    assert "convnext_yolo.launch train" in capsys.readouterr().out


def test_the_question_whether_a_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [line] = [line for line in LINES if "launch.finished" in line]
    monkeypatch.chdir(tmp_path)
    assert finished(shlex.split(line)[3:]) == 1


def literals() -> list[str]:
    """Every text of the sources that may be a message, with `…` for what is filled in."""
    found = []
    for room in ("launch", "recipes", "data_prep", "model"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (getattr(part, "value", "…") for part in node.values)
                    found.append("".join(p if isinstance(p, str) else "…" for p in parts))
    return found + [path.read_text(encoding="utf-8") for path in (ROOT / "launch").glob("*.sbatch")]


LITERALS = literals()


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message: str) -> None:
    pattern = ".*?".join(map(re.escape, message.split("…")))
    assert any(re.search(pattern, literal) for literal in LITERALS)


def test_a_message_that_nobody_says_is_found() -> None:
    """The look-up above can fail."""
    assert not any("the ranks are on holiday" in literal for literal in LITERALS)


def test_the_table_has_cause_and_mend_for_each_symptom() -> None:
    assert len(ROWS) >= 20
    assert all(len(row) == 3 and all(row) for row in ROWS)
    assert len(MESSAGES) >= 20


def test_times_are_those_of_the_supervision() -> None:
    section = CLUSTER[CLUSTER.index("## Supervision") : CLUSTER.index("**Logs.**")]
    for said, seconds in {
        "the others are ended {} s later": front.COLLECT_S,
        "or {} s of silence": lifeline.LOST_S,
        "shorter than {} s": lifeline.LOST_S,
        "after {} s they are ended": lifeline.STOP_S,
        "asked to stop, and ended {} s later": lifeline.GIVE_UP_S,
        "the run ends {} s after the first rank came": front.START_S,
        "after {} s without progress": stall.TELL_S,
        "after {} s (`--stall-s`)": stall.LIMIT_S,
    }.items():
        assert said.format(f"{seconds:.0f}") in section


def test_variables_that_are_handed_on() -> None:
    section = CLUSTER[CLUSTER.index("## Environment variables") :]
    names = re.findall(r"`([A-Z_]+\*?)`", section.partition("All else by")[0])
    assert len(names) > 10
    for name in names:
        assert HANDED_ON.fullmatch(name.replace("*", "X")), name


def test_recipe_keys_in_the_text_exist() -> None:
    given = set(re.findall(r"--(\w+\.[\w.]*\w)", CLUSTER))
    assert len(given) > 10
    known = load_recipe([recipe_path("convnext_tiny_coco")]).model_dump(by_alias=True)
    for key in given:
        section: object = known
        for part in key.split("."):
            assert isinstance(section, dict) and part in section, key
            section = section[part]


def test_links_exist() -> None:
    heads = re.findall(r"^#+ (.*)$", CLUSTER, re.M)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", CLUSTER):
        file, _, anchor = target.partition("#")
        if file:
            assert (ROOT / "docs" / file).exists(), target
        else:
            assert anchor in anchors, target


def test_scripts_and_files_that_commands_name_exist() -> None:
    named = {word for line in LINES for word in re.findall(r"(?<![\w/])launch/[\w.]+", line)}
    assert named
    assert all((ROOT / name).is_file() for name in named)
