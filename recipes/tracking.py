"""What a run says of itself: metrics.jsonl, which is the truth, and trackers beside it.

metrics.jsonl holds one record a line, and one of a kind at a step. A record is on its way to the
disk when `log` returns: a kill of the process loses none, and cuts no more than the last line,
which readers leave out. A run that is gone on with first drops what it is going to repeat, in one
atomic step. So at every moment the file is either as it was before that, or as it is afterwards.

Trackers (`trackers`) are given copies. They may fail; the file and training go on.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import Recipe
from .files import whole_file, write_whole
from .trackers import Key, Record, evaluation_files, finish, start_backends


class Tracker:
    """Writes one JSON line a record, and passes it on to the trackers. For the main rank only.

    A record has `kind` ("train" or "val"), `step`, `epoch` and numbers by name, or groups of
    numbers. NaN is None.

    Args:
        recipe: the whole configuration; `tracking` says which trackers there are.
        folder: of the run; it exists.
        step: from which the run goes on; at 0 it begins anew.
        run_ids: the trackers' ids of the run, as `run_ids` was when the checkpoint was written.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(self, recipe: Recipe, folder: Path, step: int, run_ids: dict[str, str]):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.run_ids = dict(run_ids)
        kept = _rewind(folder, step)
        self._logged: set[Key] = {(r["kind"], r["step"]) for r in kept}
        self._file = self.path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)  # of whole lines
        self._waiting = b""  # lines for which there was no space
        self._lanes = start_backends(recipe, folder, step, self.run_ids, kept)

    def log(self, record: Record) -> None:
        """Appends a record, unless there is one of its kind and step."""
        key = record["kind"], record["step"]
        if key in self._logged:  # an evaluation, where a kill came before its checkpoint
            return
        self._logged.add(key)
        self._append(record)
        for lane in self._lanes:
            lane.log(record)

    def log_evaluation(
        self,
        step: int,
        per_class: Mapping[str, Mapping[str, float]],
        pictures: Sequence[Path] = (),
    ) -> None:
        """What an evaluation says beyond numbers: after the record of the step.

        Args:
            step: of the evaluation.
            per_class: numbers by the name of the class, as in the results of `evaluate`.
            pictures: what `draw_predictions` wrote for the step; see `pictures_path`.
        """
        table, shown = evaluation_files(self.folder, step)
        if any(path != shown for path in pictures):
            raise ValueError(f"the pictures of step {step} belong into {shown}")
        try:
            rows = [{"class": name, **values} for name, values in per_class.items()]
            write_whole(table, json.dumps(rows, indent=1) + "\n")
        except OSError as error:
            _complain(f"{table}: can't be written ({error.strerror})")
        for lane in self._lanes:
            lane.evaluation(step)

    def log_weights(self, path: Path) -> None:
        """Gives the trackers the final weights, a file that stays where it is."""
        for lane in self._lanes:
            lane.put(lambda backend: backend.artifact(path))

    def close(self, stop_asked: Callable[[], bool] = lambda: False) -> None:
        """Ends the trackers, and waits for their uploads; not long once `stop_asked`."""
        if self._waiting:
            self._write(b"")
        self._file.close()
        finish(self._lanes, stop_asked)

    def _append(self, record: Record) -> None:
        self._write(json.dumps(record).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        """Appends whole lines or nothing; what finds no space waits for the next one."""
        self._waiting += line
        left = memoryview(self._waiting)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(self._size)
            _complain(f"{self.path}: can't be written ({error.strerror}); tried again later")
            return
        self._size += len(self._waiting)
        self._waiting = b""


def pictures_path(folder: Path, step: int) -> Path:
    """Where the prediction pictures of a step belong in a run's folder."""
    return evaluation_files(folder, step)[1]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run. A line cut off by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _rewind(folder: Path, step: int) -> list[dict[str, Any]]:
    """Makes the file end at a step, each record once; returns what it then holds."""
    path = folder / "metrics.jsonl"
    records = [r for r in read_metrics(folder) if r["step"] <= step] if step else []
    first = {(r["kind"], r["step"]): r for r in reversed(records)}
    kept = list(reversed(first.values()))
    text = "".join(json.dumps(r) + "\n" for r in kept).encode()
    if not path.exists() or path.read_bytes() != text:
        with whole_file(path) as partial, partial.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut after the renaming could leave it empty
    return kept


def _complain(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
