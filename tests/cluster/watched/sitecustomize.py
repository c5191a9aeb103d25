"""On PYTHONPATH of a job, this makes its ranks say what they train on, and hold where a test wants.

In the folder `CLUSTER_WATCH`, which all hosts see:

- `batches.jsonl`: a line for each micro-batch: the global step, the first lane, the ids of its
  pictures, and the hash of what is in it;
- `hold-POINT`, made by the test: ranks that come to this point wait until it is gone, or until one
  of them is asked to stop, which removes it. Each one that waits says so by `held-POINT-RANK`.

Points are `step-N`, before global step N; `evaluation`, before a batch of it; `checkpoint-N`, when
the tensors of step N are written, and nothing more.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "convnext_yolo.recipes"


class Watcher:
    """What one rank is wrapped in."""

    def __init__(self, folder: Path, rank: str):
        self.folder, self.rank = folder, rank
        self.asked: Callable[[], bool] = lambda: False

    def hold(self, point: str) -> None:
        gate = self.folder / f"hold-{point}"
        if not gate.exists():
            return
        (self.folder / f"held-{point}-{self.rank}").touch()
        while gate.exists():
            if self.asked():
                gate.unlink(missing_ok=True)
            time.sleep(0.02)  # between two looks

    def train(self, module: Any) -> None:
        to_device = module.to_device

        def watched(run: Any, batch: Any, step: int, turn: int) -> Any:
            self.asked = lambda: bool(run.stop.asked)
            if turn == 0:
                self.hold(f"step-{step + 1}")
            content = hashlib.sha256(batch.images.numpy().tobytes())
            content.update(batch.boxes_xyxy.numpy().tobytes())
            line = [step + 1, run.plan.lanes(turn).start, batch.image_ids, content.hexdigest()]
            file = os.open(self.folder / "batches.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, json.dumps(line).encode() + b"\n")  # at once: ranks share the file
            os.close(file)
            return to_device(run, batch, step, turn)

        module.to_device = watched

    def evaluate(self, module: Any) -> None:
        forward = module._forward

        def watched(*arguments: Any) -> Any:
            self.hold("evaluation")
            return forward(*arguments)

        module._forward = watched

    def checkpoint_writer(self, module: Any) -> None:
        save_file = module.save_file

        def watched(tensors: Any, path: Path, *more: Any) -> None:
            save_file(tensors, path, *more)
            self.hold(f"checkpoint-{int(path.parent.stem.removeprefix('step-'))}")

        module.save_file = watched


class Finder(importlib.abc.MetaPathFinder):
    """Wraps the modules that are watched when they are imported; until then nothing is."""

    def __init__(self, watcher: Watcher):
        self.wrap = {
            f"{PACKAGE}.{name}": getattr(watcher, name)
            for name in ("train", "evaluate", "checkpoint_writer")
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not (wrap := self.wrap.pop(name, None)):
            return None
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            wrap(module)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


if "CLUSTER_WATCH" in os.environ and os.environ.get("RANK", os.environ.get("SLURM_PROCID")):
    rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
    sys.meta_path.insert(0, Finder(Watcher(Path(os.environ["CLUSTER_WATCH"]), rank)))
