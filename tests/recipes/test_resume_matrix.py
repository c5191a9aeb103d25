"""ZeRO {0, 1, 2, 3} × ranks {1, 2, 4}, resumed at ZeRO {0, 1, 2, 3} × ranks {1, 2, 4}.

By default twelve of the pairs, each kind once as source and once as target, and none on the kind
that it was written on; `make test-long` tries all 144 and prints docs/resume-matrix.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convnext_yolo.recipes.export import export

from .forkserver import ForkServer

pytestmark = pytest.mark.process
SCRIPT = Path(__file__).with_name("ranks_resume.py")
KINDS = [(stage, ranks) for ranks in (1, 2, 4) for stage in (0, 1, 2, 3)]
# Seven steps round the circle of twelve: other ranks for each, and every change of stage.
SUBSET = [(kind, KINDS[(i + 7) % len(KINDS)]) for i, kind in enumerate(KINDS)]
ALL = [(source, target) for source in KINDS for target in KINDS]
ROUNDING = 1e-6


def name(kind: tuple[int, int]) -> str:
    return "zero{}-ranks{}".format(*kind)


def note(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text())


@pytest.fixture(scope="module")
def written(
    fork_server: ForkServer, tiny_run: Callable[..., Any]
) -> tuple[Path, Callable[[Sequence[Any]], None]]:
    """The folder with a checkpoint of every kind, and a way to resume pairs of kinds."""
    run = tiny_run(
        "matrix",
        workers=0,
        schedule={"epochs": 3, "warmup_epochs": 0.3},
        # A low rate: rounding grows from step to step, and a jump of an assignment with it.
        optimizer={"freeze": ["backbone.trunk.stem"], "lr": 1e-4},
        # Or stage 3 would leave so small a model whole.
        deepspeed={"options": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
    )
    folder = run.folder
    folder.mkdir()
    for ranks in (1, 2, 4):
        stages = [str(stage) for stage, n in KINDS if n == ranks]
        fork_server.run(ranks, str(SCRIPT), str(run.recipe), str(folder), "write", *stages)

    def read(pairs: Sequence[Any]) -> None:
        for ranks in (1, 2, 4):
            jobs = [f"{target[0]}@{name(source)}" for source, target in pairs if target[1] == ranks]
            if not jobs:
                continue
            fork_server.run(ranks, str(SCRIPT), str(run.recipe), str(folder), "read", *jobs)

    return folder, read


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_the_average_is_that_of_one_process(written: Any, kind: tuple[int, int]) -> None:
    """The EMA of any stage and number of ranks, against weights gathered after every step."""
    tensors, _ = note(written[0] / f"{name(kind)}.written")
    prefix = "one-process-ema/"
    expected = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    assert len(expected) > 50
    for key, value in expected.items():
        torch.testing.assert_close(tensors[f"ema/{key}"], value, rtol=ROUNDING, atol=ROUNDING)


def test_stages_and_ranks_train_the_same(written: Any) -> None:
    """The losses of one process at stage 0 are everybody's."""
    _, alone = note(written[0] / f"{name(KINDS[0])}.written")
    for kind in KINDS[1:]:
        _, record = note(written[0] / f"{name(kind)}.written")
        assert record["batches"] == alone["batches"]
        for ours, theirs in zip(record["losses"], alone["losses"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4), kind


@pytest.mark.parametrize("averaged", [True, False], ids=["ema", "no-ema"])
def test_exports_are_gathers_of_the_live_model(
    written: Any, tmp_path: Path, averaged: bool
) -> None:
    """Bit for bit, from a checkpoint of any stage and number of ranks."""
    for kind in KINDS:
        output = tmp_path / f"{name(kind)}.safetensors"
        export(written[0] / name(kind), output, averaged=averaged)
        exported = load_file(output)
        prefix = "ema/" if averaged else "model/"
        tensors, _ = note(written[0] / f"{name(kind)}.written")
        alive = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        assert exported.keys() == alive.keys()
        assert all(torch.equal(exported[key], alive[key]) for key in alive), kind


def test_resumes_in_a_covering_subset(written: Any) -> None:
    folder, read = written
    read(SUBSET)
    for source, target in SUBSET:
        compare(folder, source, target)


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_resumes_in_all_pairs(written: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, read = written
    rows = {}
    for target in KINDS:  # a few at a time: each leaves a record of all tensors
        read([(source, target) for source in KINDS])
        for source in KINDS:
            rows[source, target] = compare(folder, source, target)
    with capsys.disabled():
        print("\n" + table(rows))


def compare(folder: Path, source: Any, target: Any) -> float:
    """Asserts that a resume has everything; returns how far the losses are apart."""
    pair = f"{name(source)}-to-{name(target)}"
    before, was = note(folder / f"{name(source)}.written")
    after, now = note(folder / f"{pair}.read")
    kept = {key for key in before if not key.startswith("one-process-ema/")}
    assert after.keys() == kept, pair
    assert {key.split("/")[0] for key in kept} == {"model", "ema", "exp_avg", "exp_avg_sq"}
    assert "exp_avg/backbone.trunk.stem.0.weight" not in kept  # it is frozen
    for key in kept:
        assert torch.equal(after[key], before[key]), f"{pair}: {key}"
    assert now["step"] == was["step"] == 4, pair
    assert now["batches"] == was["batches"], pair
    assert now["lr"] == was["lr"], pair
    apart = 0.0
    for ours, theirs in zip(now["losses"], was["losses"], strict=True):
        assert all(math.isfinite(loss) for loss in ours.values())
        apart = max(apart, *(abs(ours[key] - theirs[key]) for key in theirs))
    assert apart <= 1e-4, pair
    if source == target:
        assert now["losses"] == was["losses"], pair  # bit for bit
    return apart


def table(rows: dict[Any, float]) -> str:
    """Largest difference of a loss in the ten steps after a resume, for all pairs, in Markdown."""
    head = [f"{stage}×{ranks}" for stage, ranks in KINDS]
    lines = ["| ZeRO stage × ranks | " + " | ".join(head) + " |", "|---" * 13 + "|"]
    for source, label in zip(KINDS, head, strict=True):
        cells = [f"{rows[source, target]:.0e}" if rows[source, target] else "0" for target in KINDS]
        lines.append(f"| **{label}** → | " + " | ".join(cells) + " |")
    return "\n".join(lines)
