"""`bench checkpoint`: how long a checkpoint holds training up, written meanwhile or waited for.

Both are the run's own `save` and `publish`, in turns in one run. A synchronous save is both at
once; an asynchronous one is `save`, then training steps until all ranks have written, then
`publish`: only the two ends hold the loop up. Writing takes its share of the machine from those
steps, so their time is given too, next to that of steps with nothing to write.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data_prep.batch import Batch
from . import bench_ranks
from .between_steps import publish, save
from .checkpoint import open_checkpoint, published
from .config import Recipe
from .run import Run
from .train import train_step

MODULE = "convnext_yolo.recipes.bench_checkpoint"  # in a rank its __name__ is another


@dataclass(frozen=True)
class Save:
    """One save, and the steps about it. Of the slowest rank."""

    copy_s: float  # to gather the tensors and copy them to host memory
    finish_s: float  # to wait for what is not written yet, and to publish
    step_s: float  # of a training step before it
    step_while_writing_s: float | None = None  # of one meanwhile; None: it was waited for

    @property
    def stall_s(self) -> float:
        """What the loop waited."""
        return self.copy_s + self.finish_s


@dataclass(frozen=True)
class CheckpointReport:
    """All that `bench checkpoint` found. Medians of the saves."""

    device: str
    processes: int
    stage: int
    saves: int  # of each kind
    bytes: int  # of a checkpoint, all ranks' parts
    write_mib_per_s: float  # written, synced, hashed and published, while the loop waits
    synchronous_s: float  # stall
    asynchronous_s: float  # stall
    ratio: float  # of the asynchronous to the synchronous
    synchronous_copy_s: float  # the part before anything is written
    asynchronous_copy_s: float
    step_s: float  # with nothing to write
    step_while_writing_s: float


def bench_checkpoint(
    recipe: Recipe, stage: int | None, processes: int | None, saves: int, output: Path
) -> CheckpointReport:
    """Saves a run by turns in both ways.

    Args:
        recipe: of which the data are not used.
        stage: of ZeRO; None: the recipe's.
        processes: ranks to start; None: the machine's GPUs, or one on the CPU.
        saves: of each kind.
        output: an existing folder, on the disk to measure; nothing stays there.

    Raises:
        BenchError, RecipeError, CheckpointError: in one sentence.
    """
    stage = recipe.deepspeed.stage if stage is None else stage
    processes = bench_ranks.processes_here(recipe, [stage], processes)
    if not output.is_dir():
        raise bench_ranks.BenchError(f"--output {output}: no such folder; give one that exists")
    recipe = bench_ranks.at_stage(recipe, stage)
    with (
        bench_ranks.synthetic(recipe, output) as measured,
        bench_ranks.progress("bench checkpoint", 2 * (saves + 1), "save") as bar,
    ):
        found = bench_ranks.measure_run(MODULE, measure, measured, [saves], processes, bar.update)
    return report(found, processes, stage)


def measure(run: Run, counts: Sequence[int], advance: Callable[[], object]) -> dict[str, Any]:
    """In every rank: saves of both kinds by turns, as records, and a checkpoint's bytes."""
    [saves] = counts
    batches = run.batches()
    kinds: dict[str, list[dict[str, Any]]] = {"synchronous": [], "asynchronous": []}
    for number in range(saves + 1):
        for kind, kept in kinds.items():
            one = _save(run, batches, wait=kind == "synchronous")
            if number:  # the first ones make their memory
                kept.append(asdict(one))
            advance()
    newest = open_checkpoint(published(run.folder / "checkpoints")[0])
    found: dict[str, Any] = {
        "device": run.world.device.type,
        "bytes": sum(part["bytes"] for part in newest.parts.values()),
    }
    for kind, kept in kinds.items():
        ranks = bench_ranks.in_all_ranks(kept)
        found[kind] = [_slowest(records) for records in zip(*ranks, strict=True)]
    return found


def _save(run: Run, batches: Iterator[Batch], wait: bool) -> Save:
    """Trains a step and saves it; trains on while it is written, if nobody is to `wait`."""
    started_s = time.perf_counter()
    train_step(run, batches)
    step_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    save(run)
    copy_s = time.perf_counter() - started_s
    meanwhile: list[float] = []
    is_written = wait
    while not is_written:
        started_s = time.perf_counter()
        is_written = train_step(run, batches).is_written
        meanwhile.append(time.perf_counter() - started_s)
    started_s = time.perf_counter()
    publish(run, last=True)  # what can't be written ends the benchmark
    finish_s = time.perf_counter() - started_s
    return Save(copy_s, finish_s, step_s, statistics.mean(meanwhile) if meanwhile else None)


def _slowest(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The longest that any rank took for each part of one save."""
    longest = {}
    for name in records[0]:
        values = [record[name] for record in records]
        longest[name] = None if None in values else max(values)
    return longest


def report(found: dict[str, Any], processes: int, stage: int) -> CheckpointReport:
    """Medians of what `measure` found."""
    waited = [Save(**record) for record in found["synchronous"]]
    aside = [Save(**record) for record in found["asynchronous"]]
    synchronous_s = statistics.median(one.stall_s for one in waited)
    asynchronous_s = statistics.median(one.stall_s for one in aside)
    writing_s = statistics.median(one.finish_s for one in waited)
    meanwhile = [one.step_while_writing_s for one in aside if one.step_while_writing_s is not None]
    return CheckpointReport(
        device=found["device"],
        processes=processes,
        stage=stage,
        saves=len(waited),
        bytes=found["bytes"],
        write_mib_per_s=round(found["bytes"] / 2**20 / writing_s, 1),
        synchronous_s=round(synchronous_s, 4),
        asynchronous_s=round(asynchronous_s, 4),
        ratio=round(asynchronous_s / synchronous_s, 4),
        synchronous_copy_s=round(statistics.median(one.copy_s for one in waited), 4),
        asynchronous_copy_s=round(statistics.median(one.copy_s for one in aside), 4),
        step_s=round(statistics.median(one.step_s for one in (*waited, *aside)), 4),
        step_while_writing_s=round(statistics.median(meanwhile), 4),
    )


def format_checkpoint(found: CheckpointReport) -> str:
    """A table for a terminal."""
    rows = (
        ("synchronous", found.synchronous_s, found.synchronous_copy_s, 1.0, found.step_s),
        (
            *("asynchronous", found.asynchronous_s, found.asynchronous_copy_s, found.ratio),
            found.step_while_writing_s,
        ),
    )
    lines = [
        f"checkpoints of {found.bytes / 2**20:,.0f} MiB, ZeRO-{found.stage}, {found.processes} "
        f"{found.device} process(es), {found.saves} saves of each kind",
        f"{'save':12} {'stall ms':>9} {'copy':>9} {'finish':>9} {'ratio':>6} {'step ms':>9}",
    ]
    lines += [
        f"{kind:12} {1e3 * stall:>9.1f} {1e3 * copy:>9.1f} {1e3 * (stall - copy):>9.1f} "
        f"{ratio:>6.3f} {1e3 * step:>9.1f}"
        for kind, stall, copy, ratio, step in rows
    ]
    lines += [
        f"write, sync, hash and publish: {found.write_mib_per_s:,.0f} MiB/s, all ranks",
        "stall: what the loop waits; copy: to gather the tensors and copy them to host memory;",
        "finish: for the rest of it; step: of training, nothing to write / meanwhile",
    ]
    return "\n".join(lines)


def as_record(found: CheckpointReport) -> dict[str, Any]:
    """For JSON."""
    return asdict(found)


if __name__ == "__main__":
    bench_ranks.serve(measure)
