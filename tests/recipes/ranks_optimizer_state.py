"""Run by test_optimizer_state.py on some ranks: the bytes of optimizer state that each holds.

python ranks_optimizer_state.py RECIPE STAGE …      writes RECIPE.zeroS-ranksN-rankR
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from convnext_yolo.recipes.distributed import start_world
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.preemption import StopRequest
from convnext_yolo.recipes.run import Run
from convnext_yolo.recipes.train import train_step

if __name__ == "__main__":
    recipe, *stages = sys.argv[1:]
    world = start_world()
    for stage in stages:
        options = ["--deepspeed.stage", stage, "--run", f"{recipe}-{stage}-{world.size}"]
        run = Run(load_recipe([Path(recipe)], options), world, "auto", StopRequest())
        train_step(run, run.batches())
        optimizer = run.engine.optimizer
        while hasattr(optimizer, "optimizer"):  # DeepSpeed's, round the recipe's own
            optimizer = optimizer.optimizer
        held = [
            tensor
            for state in optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, torch.Tensor) and tensor.dim()
        ]
        note = Path(f"{recipe}.zero{stage}-ranks{world.size}-rank{world.rank}")
        note.write_text(str(sum(tensor.nbytes for tensor in held)))
    dist.barrier()
    os._exit(0)  # see ranks_resume.py
