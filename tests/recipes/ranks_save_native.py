"""Run by test_deepspeed_import.py on some ranks: DeepSpeed's checkpoints, and what is in them.

Of a small network with all that is hard to put together again: sizes that do not divide, groups,
frozen parameters, batch statistics, a buffer of integers, and 16-bit weights with 32-bit masters.
"""

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import Tensor, nn

from convnext_yolo.recipes.distributed import start_world


def network(is_16_bit: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 7),
        nn.Identity() if is_16_bit else nn.BatchNorm1d(7),  # the CPU has no mixed one
        nn.Linear(7, 3),
        nn.Linear(3, 11),
        nn.Linear(11, 1),
    )
    net[3].requires_grad_(False)
    net[3].register_buffer("offset", torch.randn(3))
    return net


def whole(parameter: Any, stage: int) -> Tensor:
    """What an import should find of a parameter."""
    if stage > 0 and parameter.requires_grad:
        found = safe_get_full_fp32_param(parameter)
        assert found is not None
        return found.detach().clone()
    with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
        return parameter.detach().float().clone()


def main(folder: Path) -> None:
    world = start_world()
    for stage, is_16_bit in [(0, False), (1, False), (2, False), (3, False), (1, True), (3, True)]:
        net = network(is_16_bit)
        trained = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": is_16_bit},
        }
        engine, _, _, _ = deepspeed.initialize(
            model=net, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config
        )
        for _ in range(2):
            inputs = torch.randn(4, 5).to(torch.bfloat16 if is_16_bit else torch.float32)
            engine.backward(engine(inputs).float().square().mean())
            engine.step()
        name = f"stage{stage}-{'bf16' if is_16_bit else 'fp32'}"
        engine.save_checkpoint(str(folder / name), "last")
        expected = {k: whole(p, stage) for k, p in engine.module.named_parameters()}
        expected |= {
            k: b.float() if b.is_floating_point() else b for k, b in engine.module.named_buffers()
        }
        if world.is_main:
            save_file({k: t.contiguous() for k, t in expected.items()}, folder / f"{name}.expected")
    torch.distributed.barrier()
    # Six engines in one process: taken down one after the other, their threads have aborted it.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
