"""Real runs over data that is not as it should be, and with pixels left to the device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.data_prep.manifest import Manifest

from .forkserver import ForkServer
from .short_runs import TRAIN, kill_at_step, train

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def spoilt_shards(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every sixth training picture and one of validation overwritten with zeros."""
    folder = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(tiny_shards, folder, dirs_exist_ok=True)
    spoil(folder / "train", range(0, 72, 6))
    spoil(folder / "val", [7])
    return folder


def spoil(shards: Path, positions: Any) -> None:
    places = [(e, i) for e in Manifest.load(shards).shards for i in range(e.samples)]
    for position in positions:
        entry, within = places[position]
        with (shards / entry.name).open("r+b") as file:
            file.seek(int(entry.offsets[within]) + 512)
            file.write(bytes(2000))


def data(shards: Path, **more: Any) -> dict[str, Any]:
    where = {"train": str(shards / "train"), "val": str(shards / "val")}
    return {**where, "image_px": [64, 96], "workers": 1, **more}


def ledger(run: Any) -> set[tuple[str, str]]:
    lines = (run.folder / "quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert all(set(entry) == {"shard", "key", "reason"} for entry in entries)
    places = {(Path(entry["shard"]).parent.name, entry["key"]) for entry in entries}
    assert len(places) == len(entries)  # each once
    return places


def test_corrupt_samples_are_replaced_and_told_at_any_world_size(
    fork_server: ForkServer, tiny_run: Callable[..., Any], spoilt_shards: Path
) -> None:
    runs = []
    for ranks in (1, 2):
        run = tiny_run(f"spoilt-{ranks}", data=data(spoilt_shards, corrupt_limit=0.5))
        output = train(fork_server, run, ranks)
        assert "another takes its place" in output
        assert output.count("AP50") == 1  # evaluated without the picture that can't be read
        runs.append(run)
    alone, together = runs
    assert ledger(alone) == ledger(together)
    assert {split for split, _ in ledger(alone)} == {"train", "val"}
    for ours, theirs in zip(alone.losses(), together.losses(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_too_many_corrupt_samples_end_the_run_on_every_rank(
    fork_server: ForkServer, tiny_run: Callable[..., Any], spoilt_shards: Path
) -> None:
    run = tiny_run("too-many", data=data(spoilt_shards, corrupt_limit=0.02))
    job = fork_server.start(2, *TRAIN, str(run.recipe))
    codes = job.wait()
    assert 2 in codes and 0 not in codes, job.output
    sentence = "of 72 samples are corrupt, more than data.corrupt_limit = 0.02 allows"
    assert job.output.count(sentence) == 1 and "Traceback" not in job.output
    assert len(ledger(run)) in (2, 3)  # one batch may hold two


def test_pixels_left_to_the_device_train_the_same_resumed_on_other_ranks(
    fork_server: ForkServer, tiny_run: Callable[..., Any]
) -> None:
    whole, killed = (
        tiny_run(f"device-{name}", augment={"on_device": True}) for name in ("whole", "killed")
    )
    train(fork_server, whole, 2)
    kill_at_step(fork_server, killed, 6)
    train(fork_server, killed, 2)
    for ours, theirs in zip(killed.losses(), whole.losses(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
