"""Weights out of DeepSpeed's own checkpoints: all of them, to the bit, and nothing executed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from convnext_yolo.launch.cli import main
from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.weights import load_detector, tensors_sha256
from convnext_yolo.recipes.build import architecture
from convnext_yolo.recipes.checkpoint import CheckpointError
from convnext_yolo.recipes.config import Recipe
from convnext_yolo.recipes.deepspeed_import import _read_all, consolidate, import_deepspeed
from convnext_yolo.recipes.native import CLIENT_STATE

from .conftest import TinyRun
from .forkserver import ForkServer
from .short_runs import train

MODEL_FILE = "mp_rank_00_model_states.pt"


@pytest.mark.process
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_of_two_ranks_comes_back_to_the_bit(
    stage: int,
    fork_server: ForkServer,
    tiny_run: Callable[..., TinyRun],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tiny_run(
        f"native{stage}",
        deepspeed={"stage": stage},
        schedule={"epochs": 4 / 9, "warmup_epochs": 0.1},
        checkpoint={"every_steps": 2, "keep": 1, "native": True},
    )
    train(fork_server, run, 2)
    [published] = (run.folder / "checkpoints").glob("step-*")  # keep: 1
    native, output = published / "native", tmp_path / "w.safetensors"
    manifest = json.loads((published / "manifest.json").read_text())
    names = {"native/latest"} | ({"native/zero_to_fp32.py"} if stage else set())
    assert names <= manifest["parts"].keys()

    assert main(["export", str(run.folder), "--no-ema", "--output", str(output)]) == 0
    (sha256,) = re.findall("^weights sha256 (.*)$", capsys.readouterr().out, re.M)
    exported = load_detector(output)[1]
    assert main(["import", "--deepspeed", str(native), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"weights of step 4, {'ZeRO shards of 2 ranks' if stage else 'no ZeRO shards'}" in said
    assert f"weights sha256 {sha256}" in said
    assert load_detector(output)[1] == exported

    # What another program wrote has no client state of ours.
    for path in native.glob("*/*model_states.pt"):
        content = torch.load(path, weights_only=True)
        del content[CLIENT_STATE]
        torch.save(content, path)
    command = ["import", "--deepspeed", str(native / "step-00000004"), "--output", str(output)]
    assert main(command) == 2
    assert "does not say what its model is" in capsys.readouterr().err
    assert main([*command, "--config", str(run.recipe)]) == 0
    assert f"weights sha256 {sha256}" in capsys.readouterr().out


@pytest.fixture(scope="session")
def three_ranks(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ranks_save_native.py wrote."""
    folder = tmp_path_factory.mktemp("native")
    fork_server.run(3, str(Path(__file__).with_name("ranks_save_native.py")), str(folder))
    return folder


@pytest.mark.process
@pytest.mark.parametrize(
    "case",
    ["stage0-fp32", "stage1-fp32", "stage2-fp32", "stage3-fp32", "stage1-bf16", "stage3-bf16"],
)
def test_frozen_parameters_buffers_and_masters_of_three_ranks(case: str, three_ranks: Path) -> None:
    models, shards = _read_all(three_ranks / case / "last")
    assert len(shards) == (0 if case == "stage0-fp32" else 3)
    found = consolidate(models, shards)
    expected = load_file(three_ranks / f"{case}.expected")
    assert {"3.weight", "3.bias", "3.offset"} <= set(expected)  # the frozen layer
    assert ("1.running_var" in expected) == ("1.num_batches_tracked" in expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def recipe(tiny_run: Callable[..., TinyRun]) -> Recipe:
    """A run's recipe, never run."""
    return Recipe.model_validate(yaml.safe_load(tiny_run("unrun").recipe.read_text()))


@pytest.fixture
def checkpoint(recipe: Recipe, tmp_path: Path) -> Path:
    """A checkpoint as our runs write it at stage 0."""
    design = architecture(recipe, 3)
    return write(
        tmp_path / "native",
        {
            "module": build_detector(design).state_dict(),
            "global_steps": 5,
            CLIENT_STATE: {
                "architecture": design,
                "classes": [{"id": i, "name": name} for i, name in enumerate("abc")],
                "recipe": recipe.model_dump(mode="json", by_alias=True),
                "step": 5,
                "metrics": {"AP": 0.5},
            },
        },
    )


def write(folder: Path, content: Any, name: str = MODEL_FILE) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name)
    return folder


def change(folder: Path, **values: Any) -> None:
    content = torch.load(folder / MODEL_FILE, weights_only=True)
    torch.save({**content, **values}, folder / MODEL_FILE)


def test_what_is_imported_stands_alone(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "w.safetensors"
    said = import_deepspeed(checkpoint, output)
    module = torch.load(checkpoint / MODEL_FILE, weights_only=True)["module"]
    assert f"weights sha256 {tensors_sha256(module)}" in said
    info = load_detector(output)[1]
    assert (info.step, info.metrics, info.image_px) == (5, {"AP": 0.5}, (64, 96))
    assert [c["name"] for c in info.classes] == ["a", "b", "c"]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["model", "optim"])
def test_a_pickle_that_does_things_is_refused_and_does_nothing(
    place: str, checkpoint: Path, tmp_path: Path
) -> None:
    done = tmp_path / "done"
    if place == "model":
        change(checkpoint, ds_version=Touch(done))
    else:
        content = {"optimizer_state_dict": {"loss_scaler": Touch(done)}}
        write(checkpoint, content, "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="which is not data, so nothing of it was used"):
        import_deepspeed(checkpoint, tmp_path / "w.safetensors")
    assert not done.exists() and not (tmp_path / "w.safetensors").exists()
    # It would have: the trap is a real one.
    name = MODEL_FILE if place == "model" else "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.load(checkpoint / name, weights_only=False)
    assert done.exists()


def shard(count: Any) -> dict[str, Any]:
    return {"optimizer_state_dict": {"zero_stage": 1, "partition_count": count}}


def _incomplete(folder: Path) -> None:
    write(folder, shard([2, 2]), "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def _no_shards(folder: Path) -> None:
    change(folder, param_shapes=[{"weight": torch.Size([1])}])


def _misfit(folder: Path) -> None:
    change(folder, param_shapes=[{"weight": torch.Size([9])}])
    content = shard([1])
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"] = [torch.zeros(3)]
    write(folder, content, "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def _strange_count(folder: Path) -> None:
    write(folder, shard("two"), "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def _other_model(folder: Path) -> None:
    change(folder, module={"weight": torch.zeros(3)})


def _other_recipe(folder: Path) -> None:
    client_state = torch.load(folder / MODEL_FILE, weights_only=True)[CLIENT_STATE]
    change(folder, **{CLIENT_STATE: {**client_state, "recipe": {"known": 1, "key": 2}}})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (lambda f: (f / MODEL_FILE).unlink(), r"holds no \*_model_states.pt"),
    "truncated": (lambda f: (f / MODEL_FILE).write_bytes(b"PK\3\4half"), "can't be read"),
    "not a dict": (lambda f: write(f, [1, 2]), "has no 'module'"),
    "a rank's file": (_incomplete, "incomplete, with files of 1 of 2 ranks"),
    "all ranks' files": (_no_shards, "incomplete, with files of 0 of its ranks"),
    "sizes": (_misfit, "its tensors can't be put together"),
    "count": (_strange_count, "its tensors can't be put together"),
    "split": (lambda f: write(f, {}, "mp_rank_01_model_states.pt"), "only data-parallel runs"),
    "latest": (lambda f: (f / "latest").write_text("step-9"), "names 'step-9', which is not"),
    "latest above": (lambda f: (f / "latest").write_text(".."), r"names '\.\.', which is not"),
    "other model": (_other_model, "its tensors are not those of seed_convnext_yolo"),
    "client state": (lambda f: change(f, **{CLIENT_STATE: []}), "damaged or of another version"),
    "recipe": (_other_recipe, "damaged or of another version .ValidationError: 2 validation"),
    "no client state": (lambda f: write(f, {"module": {}}), "does not say what its model is"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_can_be_wrong_is_a_sentence(case: str, checkpoint: Path, tmp_path: Path) -> None:
    damage, sentence = DAMAGE[case]
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        import_deepspeed(checkpoint, tmp_path / "w.safetensors")
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--deepspeed", "x", "--model", "yolov5n"], "--model is about --yolov5"),
        (["--deepspeed", "x", "--data", "y"], "--data goes with --config"),
        (["--yolov5", "x", "--model", "yolov5n", "--data", "y"], "are about --deepspeed"),
    ],
)
def test_options_that_do_not_go_together(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["import", *words, "--output", "z"])
    assert sentence in capsys.readouterr().err


def test_shared_parameters_have_memory_of_their_own() -> None:
    tensor = torch.arange(3.0)
    state = {"module": {"a": tensor, "b": Tensor()}, "shared_params": {"b": "a"}}
    found = consolidate([state], [])
    assert torch.equal(found["b"], tensor)
    assert found["b"].data_ptr() != found["a"].data_ptr()
