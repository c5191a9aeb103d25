"""The plan of a recipe: its formulas against real ranks, and against a rank of 1,024."""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from convnext_yolo.launch.parser import Parser
from convnext_yolo.launch.plan_commands import COMMANDS
from convnext_yolo.model.detector import build_detector
from convnext_yolo.recipes.build import architecture
from convnext_yolo.recipes.config import RecipeError
from convnext_yolo.recipes.distributed import World
from convnext_yolo.recipes.engine import batch_plan, deepspeed_config
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.plan import Hardware, Plan, make_plan
from convnext_yolo.recipes.plan_memory import Memory, memory, zero_options
from convnext_yolo.recipes.plan_model import ModelFacts, PeakOfTensors, _peak_bytes, model_facts
from convnext_yolo.recipes.plan_table import format_plan
from convnext_yolo.recipes.plan_traffic import Collective, sent_bytes, traffic

from .forkserver import ForkServer

MEASURED, ONE_OF_MANY = (
    str(Path(__file__).with_name(name)) for name in ("ranks_measured.py", "rank_of_many.py")
)

# Precision and stage of what is measured on so many ranks; bf16 changes nothing at stage 0.
FP32 = tuple(f"fp32:{stage}" for stage in range(4))
CASES = {1: FP32, 2: (*FP32, "bf16:1", "bf16:2", "bf16:3"), 4: FP32}
MEASURED_PARTS = ("weights", "masters", "moments", "gradients", "buckets", "average")
CLUSTER = Hardware(gpu_tflops=312, mfu=0.3, network_gbit=200, link_gbit=2400, gpus_per_node=8)
# BatchNorm, 23 groups, frozen layers, sizes that do not divide; buckets that overflow, and at
# stage 3 parameters on both sides of the threshold.
SMALL: dict[str, Any] = {
    "model": {
        "name": "seed_convnext_yolo",
        "backbone": {"name": "test_convnext"},
        "adapter_channels": [16, 24, 33],
        "neck_channels": [16, 24, 34],
    },
    "data": {"image_px": [64, 96]},
    "batch": {"global": 16, "micro": 2},
    "optimizer": {"layer_decay": 0.8, "freeze": ["backbone.trunk.stem", "neck.adapters.2"]},
    "deepspeed": {
        "options": {
            "zero_optimization": {
                "reduce_bucket_size": 100_000,
                "stage3_param_persistence_threshold": 1000,
            }
        }
    },
}


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@functools.cache
def facts_of(precision: str, *files: Path) -> ModelFacts:
    """Of a detector of three classes; they do not depend on stage and ranks."""
    return model_facts(load_recipe(files, ["--deepspeed.precision", precision]), classes=3)


def planned(file: Path, world: int, case: str) -> tuple[Memory, list[Collective]]:
    """What the formulas say of a case of `ranks_measured`."""
    precision, stage = case.split(":")
    words = ["--deepspeed.precision", precision, "--deepspeed.stage", stage]
    recipe = load_recipe([file], [*words, "--batch.global", str(world * 4)])
    facts = facts_of(precision, file)
    plan = batch_plan(recipe, World(0, world, 0, torch.device("cpu")))
    zero = zero_options(deepspeed_config(recipe, plan))
    return memory(facts, zero, world, 2, moments=2), traffic(facts, zero, world, 2)


@pytest.mark.process
@pytest.mark.timeout(600)  # minutes, where the cores are busy
@pytest.mark.parametrize("world", CASES)
def test_formulas_hold_for_real_ranks(
    fork_server: ForkServer, world: int, small_recipe: Path, tmp_path: Path
) -> None:
    fork_server.run(world, MEASURED, str(tmp_path), str(small_recipe), *CASES[world])
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for number, case in enumerate(CASES[world]):
        measured = [rank[number] for rank in ranks]
        assert {found["case"] for found in measured} == {case}
        held, collectives = planned(small_recipe, world, case)
        for part, size in asdict(held).items():
            if part in MEASURED_PARTS:
                fullest = max(found["held"].get(part, 0) for found in measured)
                assert size == pytest.approx(fullest, rel=0.1), (case, part)
        for found in measured:
            assert set(found["payload"]) <= {"all_reduce", "all_gather", "reduce_scatter"}, case
            for kind in ("all_reduce", "all_gather", "reduce_scatter"):
                ours = [c for c in collectives if c.kind == kind]
                payload = sum(c.payload_bytes for c in ours)
                # Norms and flags count as messages of no size.
                exact = pytest.approx(payload, rel=0.01, abs=300)
                assert found["payload"].get(kind, 0) == exact, (case, kind)
                messages = sum(c.messages for c in ours)
                assert found["messages"].get(kind, 0) == pytest.approx(messages, abs=2), case


@pytest.mark.process
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_as_one_of_1024_ranks(fork_server: ForkServer, stage: int, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    sections = {
        "model": {"backbone": {"name": "convnext_tiny"}},
        "data": {"image_px": [64, 64]},
        "optimizer": {"layer_decay": 0.8},
    }
    file.write_text(yaml.safe_dump(sections))
    fork_server.run(1, ONE_OF_MANY, str(tmp_path / "held.json"), str(file), "1024", str(stage))
    found = json.loads((tmp_path / "held.json").read_text())
    assert found["was_applied"] and found["loss"] > 0
    words = ["--deepspeed.stage", str(stage), "--batch.global", "1024", "--batch.micro", "1"]
    recipe = load_recipe([file], words)
    plan = make_plan(recipe, [1024], CLUSTER)
    held = plan.share(1024, stage).memory
    assert plan.facts.parameters > 29e6
    assert found["moments"] == held.moments / 4
    assert found["averaged"] == pytest.approx(held.average / 4, rel=0.001)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_activations_are_the_real_ones(
    precision: str, checkpointing: bool, small_recipe: Path
) -> None:
    recipe = load_recipe([small_recipe], ["--deepspeed.precision", precision])
    with torch.device("meta"):
        fake = build_detector(architecture(recipe, 3)).train()
    real = build_detector(architecture(recipe, 3)).train()
    if checkpointing:
        fake.backbone.checkpoint_activations()
        real.backbone.checkpoint_activations()
    for parameter in real.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with PeakOfTensors() as tensors:
        images = torch.zeros(recipe.batch.micro, 3, *recipe.data.image_px, dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            raw = real(images)
        torch.stack([x.float().square().sum() for x in raw.levels]).sum().backward()
    assert _peak_bytes(fake, recipe, "cpu") == pytest.approx(tensors.peak, rel=0.02)


def test_activations_grow_with_frame_and_batch_and_shrink_by_checkpointing(
    small_recipe: Path,
) -> None:
    def activations(*words: str) -> int:
        return model_facts(load_recipe([small_recipe], words), classes=3).activation_bytes

    usual = activations()
    assert activations("--batch.micro", "4") == pytest.approx(2 * usual, rel=0.1)
    assert activations("--augment.multi_scale", "0.5") > 1.5 * usual
    assert activations("--deepspeed.precision", "bf16") < 0.8 * usual
    assert activations("--deepspeed.activation_checkpointing", "true") < 0.9 * usual


def test_bytes_sent_are_the_papers_in_the_limit() -> None:
    assert Collective("all_reduce", 1000, 1).sent_bytes(4) == 1500
    assert Collective("all_gather", 1000, 1).sent_bytes(4) == 750
    assert Collective("reduce_scatter", 1000, 1).sent_bytes(1) == 0
    facts = facts_of("fp32")  # ConvNeXt-Tiny
    zero = zero_options({"zero_optimization": {}})  # DeepSpeed's defaults
    # ZeRO's paper, section 7: 2 P numbers a step, and at stage 3 one and a half times as many,
    # where parameters are gathered for the forward and again for the backward pass.
    every = 4 * facts.trained
    alone = sent_bytes(traffic(facts, replace(zero, stage=0), 1024, 1), 1024)
    assert alone == pytest.approx(2 * every, rel=0.01)
    apart = replace(zero, stage=3, reuse=0, persistence=0)
    assert sent_bytes(traffic(facts, apart, 1024, 1), 1024) == pytest.approx(3 * every, rel=0.02)
    # DeepSpeed's stage 1 reduces everywhere and gathers: 3 P; its stage 2 at each micro-batch.
    for stage, numbers in ((1, 3), (2, 9)):
        ours = sent_bytes(traffic(facts, replace(zero, stage=stage), 1024, 4), 1024)
        assert ours == pytest.approx(numbers * every, rel=0.01)


def test_states_fall_as_one_over_ranks(small_recipe: Path) -> None:
    facts = facts_of("fp32", small_recipe)
    zero = zero_options({"zero_optimization": {}})
    whole = memory(facts, replace(zero, stage=0), 4, 1, moments=2).moments
    assert whole == 8 * facts.trained
    for stage in (1, 2, 3):
        of_four = memory(facts, replace(zero, stage=stage), 4, 1, moments=2).moments
        assert of_four == pytest.approx(whole / 4, rel=0.01)
    one_moment = memory(facts, replace(zero, stage=0), 4, 1, moments=1).moments
    assert one_moment == whole / 2


@pytest.fixture(scope="module")
def plan_of_64(small_recipe: Path) -> Plan:
    recipe = load_recipe([small_recipe], ["--batch.global", "64", "--batch.micro", "2"])
    return make_plan(recipe, [1, 3, 8, 16, 64], CLUSTER)


def test_times_follow_from_the_figures(plan_of_64: Plan) -> None:
    alone, many = plan_of_64.share(1, 1), plan_of_64.share(16, 1)
    operations = 64 * 3 * plan_of_64.facts.gflops * 1e9
    assert alone.step_s == pytest.approx(operations / (312e12 * 0.3))
    assert (alone.efficiency, alone.sent_bytes, alone.communication_s) == (1, 0, 0)
    assert many.compute_s == pytest.approx(alone.compute_s / 16)
    assert many.step_s == many.compute_s + many.communication_s
    assert many.images_per_s == pytest.approx(64 / many.step_s)
    assert many.efficiency == pytest.approx(alone.step_s / 16 / many.step_s)
    assert many.communication_s > many.sent_bytes / (200e9 / 8)
    # Beyond a node the network's figure counts, within it the links'.
    slow = make_plan(plan_of_64.recipe, [8, 16], replace(CLUSTER, network_gbit=1))
    assert slow.share(8, 1).step_s == plan_of_64.share(8, 1).step_s
    assert slow.share(16, 1).efficiency < many.efficiency


def test_sizes_that_do_not_divide_say_what_would(plan_of_64: Plan) -> None:
    assert set(plan_of_64.refused) == {3, 64}
    assert plan_of_64.refused[3] == "--batch.global 66"
    assert plan_of_64.refused[64] == "--batch.global 128 or --batch.micro 1"
    for gpus, needs in plan_of_64.refused.items():
        world = World(0, gpus, 0, torch.device("cpu"))
        with pytest.raises(RecipeError):
            batch_plan(plan_of_64.recipe, world)
        for way in needs.split(" or "):
            words = ["--batch.global", "64", "--batch.micro", "2", *way.split()]
            assert batch_plan(load_recipe([], words), world).accumulation >= 1
    rows = [line for line in format_plan(plan_of_64).splitlines() if line.startswith("   64 ")]
    assert len(rows) == 1 and "- needs --batch.global 128 or --batch.micro 1" in rows[0]


def test_notes_say_what_the_formulas_leave_out(small_recipe: Path) -> None:
    plan = make_plan(load_recipe([small_recipe]), [1], CLUSTER)
    assert plan.notes == ()
    options = "{zero_optimization: {offload_optimizer: {device: cpu}}, dump_state: true}"
    plan = make_plan(load_recipe([small_recipe], ["--deepspeed.options", options]), [1], CLUSTER)
    assert "options.zero_optimization.offload_optimizer: not in the formulas" in plan.notes[0]
    assert "options.dump_state" in plan.notes[0]
    # The hint for a bucket of DeepSpeed's default size is one that a recipe takes, and that helps.
    assert make_plan(load_recipe([]), [1], CLUSTER).notes == ()
    wide = ["--deepspeed.options", "{zero_optimization: {reduce_bucket_size: 500000000}}"]
    plan = make_plan(load_recipe([], wide), [1], CLUSTER)
    (hint,) = plan.notes
    words = ["--deepspeed.options", hint.split("--deepspeed.options '")[1].split("'")[0]]
    better = make_plan(load_recipe([], words), [1], CLUSTER)
    assert better.notes == ()
    assert better.share(1, 1).memory.buckets < plan.share(1, 1).memory.buckets / 10


def test_command_prints_tables_and_writes_json(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    words = ["plan", "--config", str(small_recipe), "--gpus", "8", "1", "--json", str(output)]
    options, rest = parser().parse_known_args([*words, "--deepspeed.stage", "2"])
    options.rest = rest
    options.run_command(options)
    printed = capsys.readouterr().out
    assert "ZeRO-2, the same global batch on more GPUs" in printed
    assert "activations and times are estimated" in printed
    record = json.loads(output.read_text())
    assert [(s["gpus"], s["stage"]) for s in record["shares"]] == [
        (gpus, stage) for gpus in (1, 8) for stage in range(4)
    ]
    parts = record["shares"][0]["memory"]
    assert parts.pop("total") == sum(parts.values()) > 0


@pytest.mark.parametrize(
    ("words", "peak"),
    [
        (["--deepspeed.precision", "bf16"], 312),
        (["--deepspeed.precision", "fp32"], 156),
        (["--deepspeed.precision", "fp32", "--gpu-tflops", "99"], 99),
    ],
)
def test_the_peak_is_that_of_the_recipes_precision(
    words: list[str], peak: int, small_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--config", str(small_recipe), "--gpus", "1", *words]
    options, rest = parser().parse_known_args(command)
    options.rest = rest
    options.run_command(options)
    assert f"from {peak} TFLOP/s x 0.3 a GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "0"], "'0' is not a whole number of at least 1"),
        (["--mfu", "30"], "'30' is more than the whole, 1"),
        (["--network-gbit", "fast"], "'fast' is not a number above 0"),
        (["--gpu-tflops", "nan"], "'nan' is not a number above 0"),
    ],
)
def test_bad_figures_are_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_known_args(["plan", "--config", "quickstart", *words])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def parser() -> argparse.ArgumentParser:
    result = Parser("convnext-yolo")
    commands = result.add_subparsers()
    for add in COMMANDS:
        add(commands)
    return result
