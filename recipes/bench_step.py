"""`bench step`: the time and the memory of a training step under each ZeRO stage.

The step is the run's own, on synthetic pictures through the run's own loader. Each stage has
processes of its own, so that none inherits another's memory; ratios are to the first stage, in the
same run. Steps that run freely, which give the step's time, take turns with such as are timed in
parts: on a GPU the latter wait for the device after each part.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import bench_ranks
from .clock import PHASES
from .config import Recipe
from .run import Run
from .train import train_step

MODULE = "convnext_yolo.recipes.bench_step"  # in a rank its __name__ is another


@dataclass(frozen=True)
class StageCost:
    """A step under one stage. Times are medians of the steps, of the slowest rank."""

    stage: int
    step_s: float
    images_per_s: float  # all ranks
    parts_s: dict[str, float]  # of the first rank, by the phases of `clock`, and the "rest"
    optimizer_state_bytes: list[int]  # by rank
    peak_memory_mib: list[float] | None  # by rank; None: not known, others ran there before
    relative_step: float
    relative_optimizer_state: float  # of the ranks' largest
    relative_memory: float | None  # of the ranks' largest


@dataclass(frozen=True)
class StepReport:
    """All that `bench step` found. Ratios are to the first stage."""

    device: str
    processes: int
    global_batch: int
    micro_batch: int
    image_px: tuple[int, int]
    precision: str
    stages: list[StageCost]


def bench_step(
    recipe: Recipe, stages: Sequence[int], processes: int | None, steps: int, warmup: int
) -> StepReport:
    """Times steps of a recipe under several stages.

    Args:
        recipe: of which the data are not used.
        stages: of ZeRO, one after the other.
        processes: ranks to start; None: the machine's GPUs, or one on the CPU.
        steps: timed whole, and as many in parts.
        warmup: untimed ones before.

    Raises:
        BenchError, RecipeError: in one sentence.
    """
    processes = bench_ranks.processes_here(recipe, stages, processes)
    found = []
    with (
        bench_ranks.synthetic(recipe) as measured,
        bench_ranks.progress("bench step", len(stages) * (warmup + 2 * steps), "step") as bar,
    ):
        for stage in stages:
            bar.set_postfix_str(f"ZeRO-{stage}")
            under = bench_ranks.at_stage(measured, stage)
            counts = [warmup, steps]
            found.append(
                bench_ranks.measure_run(MODULE, measure, under, counts, processes, bar.update)
            )
    if bench_ranks.is_rank():  # whose highest resident set is that of all stages so far
        for later in found[1:] if found[0]["device"] == "cpu" else ():
            later["peak_memory_mib"] = None
    return report(recipe, stages, processes, found)


def measure(run: Run, counts: Sequence[int], advance: Callable[[], object]) -> dict[str, Any]:
    """In every rank: the seconds of steps and their parts, and the memory."""
    warmup, steps = counts
    batches = run.batches()
    whole: list[float] = []
    parts: list[dict[str, float]] = []
    for number in range(warmup + 2 * steps):
        is_in_parts = run.meter.is_due(run.step + 1)
        started_s = time.perf_counter()
        train_step(run, batches)  # ends with a reduction that it reads: the device is done
        taken_s = time.perf_counter() - started_s
        advance()
        if number < warmup:
            continue
        if is_in_parts:
            seconds = dict(run.meter.clock.seconds)
            parts.append(seconds | {"rest": taken_s - sum(seconds.values())})
        else:
            whole.append(taken_s)
    medians = {name: statistics.median(p[name] for p in parts) for name in (*PHASES, "rest")}
    ranks = bench_ranks.in_all_ranks(
        [statistics.median(whole), optimizer_state_bytes(run.engine), _peak_mib(run.world.device)]
    )
    seconds_of_ranks, state, memory_mib = (list(column) for column in zip(*ranks, strict=True))
    return {
        "device": run.world.device.type,
        "step_s": max(seconds_of_ranks),
        "parts_s": medians,
        "optimizer_state_bytes": state,
        "peak_memory_mib": memory_mib,
    }


def optimizer_state_bytes(engine: Any) -> int:
    """Bytes of the moments that this rank holds."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):  # DeepSpeed's, round the recipe's own
        optimizer = optimizer.optimizer
    held = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return sum(t.nbytes for t in held if isinstance(t, torch.Tensor) and t.dim())


def _peak_mib(device: torch.device) -> float:
    """The most that this process has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # getrusage's figure begins with that of the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def report(
    recipe: Recipe, stages: Sequence[int], processes: int, found: Sequence[dict[str, Any]]
) -> StepReport:
    """What `measure` found at each stage, next to the first."""
    first = found[0]
    costs = []
    for stage, one in zip(stages, found, strict=True):
        memory_mib = one["peak_memory_mib"]
        state = max(one["optimizer_state_bytes"]) / max(first["optimizer_state_bytes"])
        costs.append(
            StageCost(
                stage=stage,
                step_s=round(one["step_s"], 5),
                images_per_s=round(recipe.batch.global_size / one["step_s"], 2),
                parts_s={name: round(s, 5) for name, s in one["parts_s"].items()},
                optimizer_state_bytes=one["optimizer_state_bytes"],
                peak_memory_mib=memory_mib and [round(mib, 1) for mib in memory_mib],
                relative_step=round(one["step_s"] / first["step_s"], 4),
                relative_optimizer_state=round(state, 4),
                relative_memory=memory_mib
                and round(max(memory_mib) / max(first["peak_memory_mib"]), 4),
            )
        )
    return StepReport(
        device=first["device"],
        processes=processes,
        global_batch=recipe.batch.global_size,
        micro_batch=recipe.batch.micro,
        image_px=recipe.data.image_px,
        precision=recipe.deepspeed.precision,
        stages=costs,
    )


def format_step(found: StepReport) -> str:
    """A table for a terminal."""
    height, width = found.image_px
    names = (*PHASES, "rest")
    lines = [
        f"{found.processes} {found.device} process(es), global batch {found.global_batch} in "
        f"micro-batches of {found.micro_batch}, {width}x{height} px, {found.precision}; relative "
        f"to ZeRO-{found.stages[0].stage}",
        f"ZeRO {'step ms':>9} {'rel.':>5} {'img/s':>8} | "
        + " ".join(f"{name[:9]:>9}" for name in names)
        + f" | {'moments MiB':>11} {'rel.':>5} | {'peak MiB':>8} {'rel.':>5}",
    ]
    for s in found.stages:
        parts = " ".join(f"{1e3 * s.parts_s[name]:>9.1f}" for name in names)
        state_mib = max(s.optimizer_state_bytes) / 2**20
        memory = f"{'-':>8} {'-':>5}"
        if s.peak_memory_mib:
            memory = f"{max(s.peak_memory_mib):>8.0f} {s.relative_memory:>5.2f}"
        lines.append(
            f"{s.stage:>4} {1e3 * s.step_s:>9.1f} {s.relative_step:>5.2f} {s.images_per_s:>8.2f} | "
            f"{parts} | {state_mib:>11.1f} {s.relative_optimizer_state:>5.2f} | {memory}"
        )
    kind = "GPU memory" if found.device == "cuda" else "resident set"
    lines += [
        "parts: of steps timed in parts, ms, first rank; communication: collectives, wherever they",
        "are started, and the waiting for other ranks in them; rest: EMA, statistics, the guard;",
        f"moments: the optimizer's, a rank; peak: {kind} of a rank; both of the largest rank",
    ]
    return "\n".join(lines)


def as_record(found: StepReport) -> dict[str, Any]:
    """For JSON."""
    return asdict(found)


if __name__ == "__main__":
    bench_ranks.serve(measure)
