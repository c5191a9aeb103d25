"""Run by test_plan.py: a real training step as one rank of a world that isn't there.

torch's fake process group answers every collective at once and changes nothing, so rank 0 of 1,024
makes its forward and backward pass and steps the optimizer over its own part; what it then holds is
what it would hold. One stage a process: a process group is made once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


def main(output: Path, recipe_file: Path, world_size: int, stage: str) -> None:
    world = join(world_size)
    from convnext_yolo.model.assign import Targets
    from convnext_yolo.model.detector import build_criterion, build_detector, without_pretrained
    from convnext_yolo.recipes.build import architecture
    from convnext_yolo.recipes.ema import Ema
    from convnext_yolo.recipes.engine import batch_plan, build_engine, commit_batch_statistics
    from convnext_yolo.recipes.load import load_recipe

    words = ["--deepspeed.stage", stage, "--batch.global", str(world_size), "--batch.micro", "1"]
    recipe = load_recipe([recipe_file], words)
    detector = build_detector(without_pretrained(architecture(recipe, 80))).train()
    criterion = build_criterion(detector, recipe.model.loss.model_dump())
    plan = batch_plan(recipe, world)
    engine = build_engine(recipe, detector, plan)
    ema = Ema(engine.module, recipe.ema)
    boxes_xyxy = torch.tensor([[8.0, 8.0, 40.0, 56.0]])
    targets = Targets(torch.tensor([0]), torch.tensor([3]), boxes_xyxy)
    raw = engine(torch.rand(1, 3, *recipe.data.image_px))
    losses = criterion(engine.module.head, raw.levels, targets)
    loss = torch.stack(list(losses.values())).sum()
    engine.backward(loss)
    engine.step()
    commit_batch_statistics(engine.module, plan, True)
    ema.update(1)
    states = engine.optimizer.optimizer.state.values()
    tensors = [t for state in states for t in state.values() if t.ndim]  # not the step count
    result = {
        "loss": loss.item(),
        "was_applied": bool(engine.was_step_applied()),
        "moments": sum(t.numel() for t in tensors),
        "averaged": sum(t.numel() for t in ema.shadow.values()),
    }
    output.write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # nobody is there to take the group down with


def join(world_size: int) -> Any:
    """The world of `distributed.start_world`, its processes pretended."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ.update({**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    import deepspeed

    from convnext_yolo.recipes.distributed import World

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles, as start_world says
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    return World(0, world_size, 0, torch.device("cpu"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
