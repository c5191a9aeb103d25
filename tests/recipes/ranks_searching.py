"""Run by test_micro_batch.py on some ranks: the search for the micro-batch, nothing else.

    python ranks_searching.py FOLDER RECIPE limits LIMIT …     what each rank can hold, by patch
    python ranks_searching.py FOLDER RECIPE memory MIB         what the process may take more

Each rank writes what it found, or the error, and the sizes tried to FOLDER/RANK.json.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

from convnext_yolo.model.detector import build_criterion, build_detector
from convnext_yolo.recipes import distributed, micro_batch
from convnext_yolo.recipes.build import architecture
from convnext_yolo.recipes.config import RecipeError
from convnext_yolo.recipes.load import load_recipe


def limit_memory(mib: int) -> None:
    """Of addresses, to what the process has and so much more."""
    status = Path("/proc/self/status").read_text()
    [size_kib] = [int(line.split()[1]) for line in status.splitlines() if "VmSize" in line]
    limit = size_kib * 1024 + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    folder, path, kind, *numbers = sys.argv[1:]
    if kind == "memory":
        # What a try has freed must go back for the next one: oneDNN maps the code it makes.
        setattr(distributed, "keep_freed_memory", lambda device: None)  # noqa: B010, as below
    world = distributed.start_world()
    recipe = load_recipe([Path(path)], [])
    model = build_detector(architecture(recipe, 3))
    criterion = build_criterion(model, recipe.model.loss.model_dump())
    tried: list[int] = []
    whole: Any = micro_batch._try

    def attempt(size: int, *rest: Any) -> None:
        tried.append(size)
        if kind == "memory":
            whole(size, *rest)
        elif size > int(numbers[world.rank]):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    setattr(micro_batch, "_try", attempt)  # noqa: B010, mypy takes it for a mistake
    if kind == "memory":
        # Threads begin, libraries are loaded, and every thread has its storage of each of them:
        # where the C library lacks memory for that it ends the process.
        whole(recipe.batch.global_size, recipe, model, criterion, world.device)
        limit_memory(int(numbers[0]))
    told: dict[str, Any] = {}
    try:
        told["found"] = micro_batch.find_micro_batch(recipe, model, criterion, world)
    except RecipeError as error:
        told["error"] = str(error)
    told["tried"] = tried
    Path(folder, f"{world.rank}.json").write_text(json.dumps(told))
    distributed.stop_world()
