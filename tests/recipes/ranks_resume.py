"""Run by test_resume_matrix.py on some ranks: checkpoints of any stage, gone on from at any other.

    python ranks_resume.py RECIPE FOLDER write STAGE …    trains 4 steps at each stage and saves;
                                                          writes down what is alive, then goes on
    python ranks_resume.py RECIPE FOLDER read STAGE@SOURCE …   resumes each, writes down the same

What is alive is gathered by other means than the checkpoint's: DeepSpeed's public calls. Beside it
the average that one process would keep is computed from gathered weights, step by step.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import Tensor

from convnext_yolo.data_prep.batch import Batch
from convnext_yolo.recipes.between_steps import publish, save
from convnext_yolo.recipes.distributed import World, start_world
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.preemption import StopRequest
from convnext_yolo.recipes.run import Run
from convnext_yolo.recipes.train import train_step

BEFORE, AFTER = 4, 10  # steps


def weights(run: Run) -> dict[str, Tensor]:
    """Every tensor of the model by name, whole."""
    parameters = list(run.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=run.recipe.deepspeed.stage == 3):
        return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def alive(run: Run) -> dict[str, Tensor]:
    """Weights, statistics, moments and average of a running engine."""
    found = {f"model/{name}": tensor for name, tensor in weights(run).items()}
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                moment = (
                    safe_get_full_optimizer_state(parameter, key)
                    if run.recipe.deepspeed.stage
                    else run.engine.optimizer.state[parameter][key]
                )
                assert moment is not None, name
                found[f"{key}/{name}"] = moment.clone()
    return found | {f"ema/{name}": tensor.clone() for name, tensor in run.ema.gather().items()}


def follow_average(average: dict[str, Tensor], run: Run) -> None:
    """One process's average after a step."""
    options = run.recipe.ema
    decay = options.decay * (1 - math.exp(-run.step / options.ramp_steps))
    for name, value in weights(run).items():
        if value.is_floating_point():
            average[name] = torch.lerp(average[name], value, 1 - decay)
        else:
            average[name] = value


class Watched:
    """Micro-batches on their way to the loop; `digest` is of all ranks' since it was last asked."""

    def __init__(self, run: Run):
        self.run, self.batches, self.seen = run, run.batches(), {}  # type: ignore[var-annotated]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self.batches)
        content = hashlib.sha256(str(batch.image_ids).encode())
        for tensor in (batch.images, batch.boxes_xyxy, batch.labels, batch.image_index):
            content.update(tensor.contiguous().numpy().tobytes())
        turn = len(self.seen) % self.run.plan.accumulation
        self.seen[self.run.plan.lanes(turn).start] = content.hexdigest()
        return batch

    def digest(self) -> str:
        everyone: list[Any] = [None] * self.run.world.size
        dist.all_gather_object(everyone, self.seen)
        self.seen = {}
        whole = {lane: digest for own in everyone for lane, digest in own.items()}
        return hashlib.sha256(json.dumps(sorted(whole.items())).encode()).hexdigest()


def go_on(run: Run, batches: Watched) -> dict[str, Any]:
    """The next steps: digests of batches, losses and learning rates."""
    record: dict[str, Any] = {"step": run.step, "batches": [], "losses": [], "lr": []}
    for _ in range(AFTER):
        record["losses"].append(train_step(run, batches).losses)
        record["batches"].append(batches.digest())
        record["lr"].append([group["lr"] for group in run.engine.optimizer.param_groups])
    return record


def write(recipe: Path, folder: Path, stage: int, world: World) -> None:
    name = f"zero{stage}-ranks{world.size}"
    run = begin(recipe, folder / name, stage, world)
    average = {name: tensor.clone() for name, tensor in weights(run).items()}
    batches = Watched(run)
    for _ in range(BEFORE):
        train_step(run, batches)
        batches.digest()
        follow_average(average, run)
    tensors = alive(run)
    save(run)
    publish(run, last=True)
    tensors |= {f"one-process-ema/{name}": tensor for name, tensor in average.items()}
    note(folder / f"{name}.written", world, tensors, go_on(run, batches))


def read(recipe: Path, folder: Path, stage: int, source: str, world: World) -> None:
    name = f"{source}-to-zero{stage}-ranks{world.size}"
    if world.is_main:
        shutil.copytree(folder / source / "checkpoints", folder / name / "checkpoints")
    dist.barrier()
    run = begin(recipe, folder / name, stage, world)
    tensors = alive(run)
    record = go_on(run, Watched(run))
    note(folder / f"{name}.read", world, tensors, record)
    if world.is_main:
        shutil.rmtree(folder / name)


def begin(recipe: Path, folder: Path, stage: int, world: World) -> Run:
    options = ["--run", str(folder), "--deepspeed.stage", str(stage)]
    return Run(load_recipe([recipe], options), world, "auto", StopRequest())


def note(path: Path, world: World, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    if world.is_main:
        save_file({k: t.contiguous() for k, t in tensors.items()}, f"{path}.safetensors")
        Path(f"{path}.json").write_text(json.dumps(record))


def main(recipe: Path, folder: Path, what: str, jobs: list[str]) -> None:
    world = start_world()
    for job in jobs:
        stage, _, source = job.partition("@")
        if what == "write":
            write(recipe, folder, int(stage), world)
        else:
            read(recipe, folder, int(stage), source, world)
        if world.is_main:
            print(f"done {what} {job}", flush=True)
    dist.barrier()
    # Many engines in one process: taken down one after the other, their threads have aborted it.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
