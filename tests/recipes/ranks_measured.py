"""Run by test_plan.py on some ranks: what each really holds and really passes to collectives.

For each case the real engine makes three global steps of two micro-batches; the third is measured,
as the first at stage 3 still learns the order of layers. Held memory is found by following
DeepSpeed's own attributes, at each collective, around each reduction and before the optimizer
steps; each storage counts once, for the first holder that has it. What only DeepSpeed's stack
frames hold (its flat copies) counts as buckets. Traffic is what goes through torch.distributed.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Counts = dict[str, int]

# DeepSpeed's functions that make flat copies for a collective.
REDUCING = ("allreduce_bucket", "reduce_scatter_coalesced", "_all_gather_dtype")


def main(folder: Path, recipe_file: Path, cases: list[str]) -> None:
    """Cases are `precision:stage`; fp32 goes first: DeepSpeed's autocast stays on in a process."""
    watch = Watch()  # before DeepSpeed takes torch's functions over
    from convnext_yolo.recipes.distributed import start_world
    from convnext_yolo.recipes.load import load_recipe

    world = start_world()
    results = []
    for case in cases:
        precision, stage = case.split(":")
        words = ["--deepspeed.precision", precision, "--deepspeed.stage", stage]
        words += ["--batch.global", str(world.size * 4), "--batch.micro", "2"]
        held, payload, messages = measure(load_recipe([recipe_file], words), world, watch)
        results.append({"case": case, "held": held, "payload": payload, "messages": messages})
    (folder / f"{world.rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # several engines in one process: taken down one by one, their threads abort it


def measure(recipe: Any, world: Any, watch: "Watch") -> tuple[Counts, Counts, Counts]:
    """The most that each part holds in a step, and what goes over the wire by kind."""
    from convnext_yolo.model.detector import build_detector
    from convnext_yolo.recipes.build import architecture
    from convnext_yolo.recipes.ema import Ema
    from convnext_yolo.recipes.engine import batch_plan, build_engine, commit_batch_statistics
    from convnext_yolo.recipes.state import create_optimizer_state

    plan = batch_plan(recipe, world)
    torch.manual_seed(0)
    engine = build_engine(recipe, build_detector(architecture(recipe, 3)).train(), plan)
    ema = Ema(engine.module, recipe.ema)
    create_optimizer_state(engine, recipe.optimizer.name, 0)
    watch.follow(engine, ema)
    for step in range(3):
        watch.restart()
        for _ in range(plan.accumulation):
            raw = engine(torch.rand(plan.micro_batch, 3, *recipe.data.image_px))
            watch.look()
            engine.backward(torch.stack([x.float().square().mean() for x in raw.levels]).sum())
            engine.step()
        commit_batch_statistics(engine.module, plan, True)
        ema.update(step + 1)
        dist.all_reduce(torch.zeros(6))  # losses and flags
    watch.engine = None
    return dict(watch.held), dict(watch.payload), dict(watch.messages)


class Watch:
    """Wraps torch.distributed's functions and looks at an engine whenever one is called."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.restart()
        whole: dict[str, tuple[str, Callable[..., int]]] = {
            "all_reduce": ("all_reduce", lambda tensor, *_, **__: tensor.nbytes),
            "all_gather_into_tensor": (
                "all_gather",
                lambda output_tensor, *_, **__: output_tensor.nbytes,
            ),
            "reduce_scatter_tensor": (
                "reduce_scatter",
                lambda output, input, *_, **__: input.nbytes,
            ),
        }
        for name, (kind, size) in whole.items():
            setattr(dist, name, self._wrapped(getattr(dist, name), kind, size))
        for name in ("reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all_single"):
            setattr(dist, name, self._wrapped(getattr(dist, name), name, lambda *_, **__: 0))

    def restart(self) -> None:
        """Forgets what was seen."""
        self.held: Counts = defaultdict(int)
        self.payload: Counts = defaultdict(int)
        self.messages: Counts = defaultdict(int)

    def follow(self, engine: Any, ema: Any) -> None:
        """Looks at this engine from now on."""
        self.engine, self.ema, reduce = engine, ema, engine.allreduce_gradients

        def looked_at(*arguments: Any, **options: Any) -> None:
            self.look()
            reduce(*arguments, **options)
            self.look()

        engine.allreduce_gradients = looked_at
        torch_optimizer(engine).register_step_pre_hook(lambda *_: self.look())

    def look(self, frame: FrameType | None = None) -> None:
        """Notes what each part holds now, where that is more than before."""
        if self.engine is None:
            return
        seen: set[int] = set()
        for part, tensors in holders(self.engine, self.ema, frame):
            size = 0
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    size += storage.nbytes()
            self.now[part] += size
        for part, size in self.now.items():
            self.held[part] = max(self.held[part], size)
        self.now.clear()

    now: Counts = defaultdict(int)

    def _wrapped(
        self, function: Callable[..., Any], kind: str, size: Callable[..., int]
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.payload[kind] += size(*arguments, **options)
            self.messages[kind] += 1
            self.look(sys._getframe(1))
            return function(*arguments, **options)

        return call


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def holders(
    engine: Any, ema: Any, frame: FrameType | None
) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Each part's tensors, in the order in which a shared storage is assigned."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    parameters = list(engine.module.parameters())
    yield "weights", [*parameters, *engine.module.buffers()]
    yield "weights", [p.ds_tensor for p in parameters if stage == 3]
    masters: list[Tensor] = []
    if stage in (1, 2):
        masters = zero.single_partition_of_fp32_groups
    elif stage == 3:
        masters = zero.fp32_partitioned_groups_flat
    yield "masters", masters
    yield "average", ema.shadow.values()
    states = torch_optimizer(engine).state.values()
    yield "moments", [t for state in states for t in state.values() if isinstance(t, Tensor)]
    yield "buckets", all_tensors([b.buffer for b in getattr(zero, "ipg_buckets", {}).values()])
    gradients: list[Any] = [p.grad for p in [*parameters, *masters]]
    names = ("averaged_gradients", "all_grad_tensors", "grads_in_partition")
    gradients += [getattr(zero, name, None) for name in (*names, "grad_partitions_flat_buffer")]
    yield "gradients", all_tensors(gradients)
    while frame is not None:
        if frame.f_code.co_name in REDUCING:
            yield "buckets", all_tensors(list(frame.f_locals.values()))
        frame = frame.f_back


def all_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from all_tensors(item)
    elif isinstance(value, dict):
        yield from all_tensors(list(value.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
