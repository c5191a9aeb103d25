"""What the benchmarks of training share: synthetic shards, and processes started for the measuring.

What is measured is a real run's own step and its own checkpoint; only the pictures are made up. The
command starts ranks of its own, fresh ones for each setting, which say on their standard output
(JSON lines) how far they are, and end with a result. As one of a launcher's ranks it starts
nothing and measures in that world.

Invariant: no rank outlives the command. It ends them by force, each with what it has started; and
where it is killed itself, each rank reads the end of its standard input and does the same.
"""

import contextlib
import gc
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from ..data_prep.formats import read_coco
from ..data_prep.shard import shard_dataset
from ..model.detector import without_pretrained
from .config import Recipe
from .distributed import World, start_world
from .engine import batch_plan, deepspeed_config
from .load import load_recipe
from .preemption import StopRequest
from .run import Run

CLASSES = 80
BOXES = 8  # a picture, as COCO has it
EPOCHS = 1_000_000  # nothing that depends on a run's end happens
MEASURE_EVERY = 2  # steps that are timed in parts take turns with such as run freely

# What ranks call: a run, how much is to be measured, and something to call after each part of it.
# All return the same, for JSON.
Measure = Callable[[Run, Sequence[int], Callable[[], object]], Any]


class BenchError(Exception):
    """A benchmark that can't be run to its end. The text is one sentence."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def is_rank() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ


def processes_here(recipe: Recipe, stages: Sequence[int], processes: int | None) -> int:
    """How many ranks this machine shall run: its GPUs, or one on the CPU, unless it is said.

    Raises:
        BenchError, RecipeError: that many can't be, or can't train the recipe; in one sentence.
    """
    gpus = torch.cuda.device_count()
    if is_rank():
        if processes is not None:
            raise BenchError(
                f"--processes {processes}: a launcher has started the processes; leave it out"
            )
        processes = int(os.environ["WORLD_SIZE"])
    elif processes is None:
        processes = gpus or 1
    elif gpus and processes > gpus:
        raise BenchError(f"--processes {processes}: this machine has {gpus} GPU(s)")
    for stage in stages:
        plan = batch_plan(recipe, World(0, processes, 0, torch.device("cpu")))
        deepspeed_config(at_stage(recipe, stage), plan)
    return processes


def at_stage(recipe: Recipe, stage: int) -> Recipe:
    """The recipe under a ZeRO stage."""
    section = recipe.deepspeed.model_copy(update={"stage": stage})
    return recipe.model_copy(update={"deepspeed": section})


def progress(name: str, total: int, unit: str) -> Any:
    """A bar on stderr, of one process alone."""
    is_silent = os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, desc=name, unit=unit, delay=2, disable=is_silent)


@contextlib.contextmanager
def synthetic(recipe: Recipe, disk: Path | None = None) -> Iterator[Recipe]:
    """The recipe as it is measured: on pictures made here, with random weights and no trackers.

    Pictures, and whatever the run writes, are in a folder that goes at the end. It is made in
    `disk`, or where the system has its temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="convnext-yolo-bench-", dir=disk) as name:
        folder = Path(name)
        _write_shards(folder, recipe.batch.global_size, recipe.data.image_px)
        values = recipe.model_dump(mode="json", by_alias=True)
        shards = str(folder / "shards")
        changes: dict[str, dict[str, Any]] = {
            "model": {**without_pretrained(values["model"]), "weights": None},
            "data": {"train": shards, "val": shards},
            "batch": {"find_micro": False},
            "schedule": {"epochs": EPOCHS},
            "checkpoint": {"asynchronous": True, "keep_best": False},
            "tracking": {
                **{"wandb": "off", "comet": "off", "tensorboard": False, "log_weights": False},
                "log_every": MEASURE_EVERY,
            },
        }
        for section, keys in changes.items():
            values[section] = {**values[section], **keys}
        yield Recipe.model_validate({**values, "run": str(folder / "run")})


def _write_shards(folder: Path, count: int, frame_px: tuple[int, int]) -> None:
    """Shards of pictures of the frame's size, smooth enough to cost what photographs do."""
    rng = np.random.default_rng(0)
    height, width = frame_px
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir()
    for i in range(count):
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{i}.jpg", quality=90)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": width, "height": height})
        for _ in range(BOXES):
            w, h = (int(rng.integers(8, side // 2)) for side in (width, height))
            x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            where = {"id": len(annotations), "image_id": i}
            annotations.append(box | where | {"category_id": int(rng.integers(CLASSES))})
    categories = [{"id": i, "name": f"class {i}"} for i in range(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(document), encoding="utf-8")
    dataset = read_coco(folder / "instances.json", folder / "images")
    shard_dataset(dataset, folder / "shards", progress=False)


def measure_run(
    module: str,
    measure: Measure,
    recipe: Recipe,
    counts: Sequence[int],
    processes: int,
    advance: Callable[[], object],
) -> Any:
    """Measures a run in ranks started for it or, as one of a launcher's ranks, in this world.

    Args:
        module: the full name of one whose main program is `serve(measure)`.
        measure: the measuring.
        recipe: as `synthetic` gives it.
        counts: for `measure`.
        processes: how many ranks.
        advance: called as often as `measure` does.

    Returns:
        What `measure` returned.

    Raises:
        BenchError: a rank failed; in its own words, if it had any.
    """
    if is_rank():
        return _measure_here(measure, recipe, start_world(), counts, advance)
    with tempfile.TemporaryDirectory(prefix="convnext-yolo-bench-") as name:
        path, log = Path(name) / "recipe.yaml", Path(name) / "log"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        words = [sys.executable, "-m", module, str(path), *map(str, counts)]
        said: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        ranks: list[subprocess.Popen[str]] = []
        with log.open("w", encoding="utf-8") as noise:
            try:
                for environment in _environments(processes, name):
                    rank = subprocess.Popen(
                        words,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=noise,
                        text=True,
                        env={**os.environ, **environment},
                        start_new_session=True,
                    )
                    ranks.append(rank)
                    listener = (rank.stdout, len(ranks) - 1, said)
                    threading.Thread(target=_listen, args=listener, daemon=True).start()
                return _result(said, ranks, advance, log)
            finally:
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(rank.pid, signal.SIGKILL)
                    rank.wait()


def _environments(processes: int, scratch: str) -> Iterator[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    # Ended by force, ranks do not clear up what their libraries leave.
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TMPDIR": scratch}
    if not torch.cuda.is_available():
        common["OMP_NUM_THREADS"] = threads
    for rank in range(processes):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        yield world | common


def _listen(output: TextIO, rank: int, said: "queue.Queue[Any]") -> None:
    for line in output:
        said.put((rank, json.loads(line)))
    said.put((rank, None))


def _result(
    said: "queue.Queue[tuple[int, dict[str, Any] | None]]",
    ranks: Sequence["subprocess.Popen[str]"],
    advance: Callable[[], object],
    log: Path,
) -> Any:
    """What the first rank found, once it has; the others have nothing more to do then."""
    while True:
        rank, message = said.get()
        if message is None:  # its output has ended without a result
            code = ranks[rank].wait()
            sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-4000:])
            raise BenchError(f"rank {rank} ended with exit code {code}; its output is above", 1)
        if "error" in message:
            raise BenchError(message["error"], message["exit_code"])
        if "result" in message:
            return message["result"]
        advance()


def serve(measure: Measure) -> None:
    """The whole of a started rank's program: measures, and says so on standard output."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not for the one who listens
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(**message: Any) -> None:
        print(json.dumps(message), file=messages, flush=True)

    try:
        world = start_world()
        recipe, counts = load_recipe([Path(sys.argv[1])]), [int(word) for word in sys.argv[2:]]

        def advance() -> None:
            if world.is_main:
                say(progress=1)

        result = _measure_here(measure, recipe, world, counts, advance)
        if world.is_main:
            say(result=result)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            traceback.print_exc()
            os._exit(1)  # at once: a collective of another thread may never end
        say(error=str(error), exit_code=code)
    threading.Event().wait()  # for the end by force: an engine takes seconds to end in peace


def _measure_here(
    measure: Measure,
    recipe: Recipe,
    world: World,
    counts: Sequence[int],
    advance: Callable[[], object],
) -> Any:
    folder = [recipe.run]
    dist.broadcast_object_list(folder)  # each of a launcher's ranks has made one
    if world.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    run = Run(recipe.model_copy(update={"run": folder[0]}), world, "never", StopRequest())
    result = measure(run, counts, advance)
    dist.barrier()
    return result


def _end_with_parent() -> None:
    # Not through sys.stdin: loader processes forked meanwhile would find its lock taken for ever.
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def in_all_ranks(mine: Any) -> list[Any]:
    """What each rank has; all ranks call it."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
