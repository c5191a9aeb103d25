"""Run by test_guard.py on some ranks: a training in which numbers go wrong.

    python ranks_with_nan.py WHERE STEPS RANK RECIPE [OPTION …]

WHERE is a module's name, whose output becomes NaN, or `gradient:NAME`, whose gradient does, in each
of the global STEPS (such as 3,4; from 1), on rank RANK only.
"""

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from convnext_yolo.launch.cli import main
from convnext_yolo.recipes import train
from convnext_yolo.recipes.run import Run


class Nan(torch.autograd.Function):
    """The identity, but for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def install(where: str, steps: set[int]) -> None:
    kind, _, name = where.rpartition(":")
    whole: Any = train.train_step
    hooked: list[Run] = []

    def spoil(module: nn.Module, arguments: Any, output: Tensor) -> Any:
        if current not in steps or not module.training:
            return None
        return Nan.apply(output) if kind else output * float("nan")  # type: ignore[no-untyped-call]

    def train_step(run: Run, batches: Any) -> Any:
        nonlocal current
        current = run.step + 1  # also while the guard repeats the step
        if not hooked:
            run.model.get_submodule(name).register_forward_hook(spoil)
            hooked.append(run)
        return whole(run, batches)

    current = 0
    setattr(train, "train_step", train_step)  # noqa: B010, mypy takes it for a mistake


if __name__ == "__main__":
    where, steps, rank, recipe, *options = sys.argv[1:]
    if os.environ["RANK"] == rank:
        install(where, {int(step) for step in steps.split(",")})
    sys.exit(main(["train", "--config", recipe, *options]))
