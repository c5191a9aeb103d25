"""The trackers beside metrics.jsonl: what one has to offer, and how it is kept from doing harm.

Each works in a thread of its own, behind a queue: training waits for none of them, but a moment at
the start and at the end, up to a limit. One that fails, hangs or falls behind is left alone, with
one line on stderr.

Nothing is lost by that, or by a kill: a run that is gone on with first gives each tracker the
records that it does not hold, read back from the run's folder.
"""

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .config import Recipe

START_LIMIT_S = 30.0
FINISH_LIMIT_S = 300.0  # uploads of a run that has come to its end
STOP_LIMIT_S = 5.0  # of one that was asked to stop: launchers kill those that dawdle
QUEUE_LENGTH = 10_000  # calls

Record = Mapping[str, Any]
Key = tuple[str, int]  # kind and step: of every record, and of one only


class Backend(Protocol):
    """One tracker, started. Any call may raise anything and last for ever."""

    def held(self, records: Sequence[Record]) -> set[Key]:
        """What it has from earlier sessions: some of the run's records so far, or later ones."""

    def log(self, record: Record) -> None:
        """The numbers of a record; see `numbers`."""

    def table(self, name: str, rows: Sequence[Record], step: int) -> None:
        """Rows with the same columns, at least one."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """A picture file, which stays."""

    def artifact(self, path: Path) -> None:
        """The final weights, a file that stays."""

    def close(self) -> None:
        """Sends what is left, and ends."""


@dataclass(frozen=True)
class Start:
    """How a tracker begins, and is left."""

    load: Callable[[Recipe], None]  # imports all that it needs; ImportError: not installed
    make: Callable[[], Backend]
    # Called where a call lasts too long, perhaps `make` itself: afterwards the process can end.
    abandon: Callable[[], None] = lambda: None


def start_backends(
    recipe: Recipe, folder: Path, step: int, run_ids: dict[str, str], records: Sequence[Record]
) -> "list[Lane]":
    """The recipe's trackers; `run_ids` gets those of new ones.

    Args:
        recipe: the whole configuration.
        folder: of the run.
        step: from which it goes on.
        run_ids: by tracker, as a checkpoint kept them.
        records: of the run so far.
    """
    from . import tracking_comet, tracking_tensorboard, tracking_wandb

    options = recipe.tracking
    starts: dict[str, Start] = {}
    if options.wandb != "off":
        wandb_id = run_ids.setdefault("wandb", tracking_wandb.new_id())
        starts["wandb"] = Start(
            tracking_wandb.load,
            lambda: tracking_wandb.WandB(recipe, folder, wandb_id),
            tracking_wandb.abandon,
        )
    if options.comet != "off":
        comet_id = run_ids.setdefault("comet", tracking_comet.new_id())
        starts["comet"] = Start(
            tracking_comet.load, lambda: tracking_comet.Comet(recipe, folder, comet_id)
        )
    if options.tensorboard:
        starts["tensorboard"] = Start(
            tracking_tensorboard.load,
            lambda: tracking_tensorboard.TensorBoard(recipe, folder, step),
        )
    return start_lanes(recipe, folder, records, starts)


def start_lanes(
    recipe: Recipe,
    folder: Path,
    records: Sequence[Record],
    starts: Mapping[str, Start],
) -> "list[Lane]":
    """Starts trackers by name, one after the other.

    Python's imports do not go well with threads: two that import the same library from different
    ends fail, and a loader process that is forked meanwhile inherits the locks. So libraries are
    loaded here, and each tracker may start in peace before the next one is loaded.
    """
    lanes: list[Lane] = []
    deadline_s = time.monotonic() + START_LIMIT_S
    for name, start in starts.items():
        try:
            start.load(recipe)
        except ImportError as error:
            extra = "train" if name == "wandb" else name
            say(name, f"is not installed ({error}): pip install 'convnext-yolo[{extra}]'")
            continue
        except Exception as error:
            say(name, f"does not start: {error}")
            continue
        lane = Lane(name, start, folder, records)
        lanes.append(lane)
        if not lane.ready.wait(max(0.0, deadline_s - time.monotonic())):
            say(name, "is slow to start; training does not wait for it")
    return lanes


class Lane:
    """A tracker and the thread that it works in.

    Args:
        name: of the tracker.
        start: what makes the backend, in the thread.
        folder: of the run.
        records: of the run so far; those that the backend lacks are sent first.
    """

    def __init__(
        self,
        name: str,
        start: Start,
        folder: Path,
        records: Sequence[Record] = (),
    ):
        self.name, self.folder = name, folder
        self.ready = threading.Event()  # started, or failed
        self._start, self._records = start, records
        self._calls: queue.Queue[Callable[[Backend], None] | None] = queue.Queue(QUEUE_LENGTH)
        self._held: set[Key] = set()
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Backend], None] | None) -> None:
        """Has the backend do something in its turn; None: that was all."""
        if self._given_up:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up("does not keep up")

    def log(self, record: Record) -> None:
        """Has the backend log a record, unless it did in an earlier session."""
        self.put(lambda backend: self._unless_held(backend, record, with_evaluation=False))

    def evaluation(self, step: int) -> None:
        """Has the backend show what the run's folder holds of an evaluation, likewise."""

        def show(backend: Backend) -> None:
            if ("val", step) not in self._held:
                show_evaluation(backend, self.folder, step)

        self.put(show)

    def is_done(self, wait_s: float) -> bool:
        """Whether it has ended, within that time."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Leaves it, in whatever it does."""
        self._give_up("has not finished in time")
        try:
            self._start.abandon()
        except Exception as error:
            say(self.name, f"could not be ended: {error}")

    def _work(self) -> None:
        try:
            backend = self._start.make()
            self._catch_up(backend)
            self.ready.set()
            while not self._given_up and (call := self._calls.get()):
                call(backend)
            backend.close()
        except (Exception, SystemExit) as error:
            if not self._given_up:
                doing = "stopped" if self.ready.is_set() else "does not start"
                self._give_up(f"{doing}: {str(error).strip() or type(error).__name__}")
        finally:
            self.ready.set()

    def _catch_up(self, backend: Backend) -> None:
        """Gives a backend what a kill, a failure or its being off kept from it."""
        self._held = backend.held(self._records)
        for record in self._records:
            self._unless_held(backend, record, with_evaluation=record["kind"] == "val")
        self._records = ()

    def _unless_held(self, backend: Backend, record: Record, with_evaluation: bool) -> None:
        if (record["kind"], record["step"]) in self._held:
            return
        backend.log(record)
        if with_evaluation:
            show_evaluation(backend, self.folder, record["step"])

    def _give_up(self, why: str) -> None:
        self._given_up = True
        say(self.name, why)


def finish(lanes: Sequence[Lane], stop_asked: Callable[[], bool]) -> None:
    """Ends all trackers, within a limit that is short once the run was asked to stop."""
    for lane in lanes:
        lane.put(None)
    began_s = time.monotonic()
    stopped_s: float | None = None
    working = list(lanes)
    while working := [lane for lane in working if not lane.is_done(0.05)]:
        now_s = time.monotonic()
        if stopped_s is None and stop_asked():
            stopped_s = now_s
        asked_too_long = stopped_s is not None and now_s - stopped_s > STOP_LIMIT_S
        if asked_too_long or now_s - began_s > FINISH_LIMIT_S:
            for lane in working:
                lane.abandon()
            return


def say(name: str, text: str) -> None:
    """Prints a line about a tracker that is in trouble."""
    print(f"{name} {text}; metrics.jsonl has everything", file=sys.stderr, flush=True)


def numbers(record: Record) -> dict[str, float]:
    """The numbers of a record by `kind/name`, those of groups by `kind/name/group`."""
    kind = record["kind"]
    found: dict[str, float] = {}
    for name, value in record.items():
        parts = {f"/{group}": v for group, v in value.items()} if isinstance(value, dict) else {}
        for suffix, number in (parts or {"": value}).items():
            if isinstance(number, int | float) and not isinstance(number, bool) and name != "step":
                found[f"{kind}/{name}{suffix}"] = number
    return found


def evaluation_files(folder: Path, step: int) -> tuple[Path, Path]:
    """Where a run keeps an evaluation's AP by class, and its pictures."""
    stem = f"step-{step:08}"
    return folder / "predictions" / f"{stem}.json", folder / "predictions" / f"{stem}.jpg"


def show_evaluation(backend: Backend, folder: Path, step: int) -> None:
    """Gives a backend the table and the pictures of an evaluation, where the folder has them."""
    table, picture = evaluation_files(folder, step)
    rows = json.loads(table.read_text(encoding="utf-8")) if table.exists() else []
    if rows:
        backend.table("val/per_class", rows, step)
    if picture.exists():
        backend.picture("val/predictions", picture, step)


def columns(rows: Iterable[Record]) -> list[str]:
    """The columns of a table: those of its first row."""
    return list(next(iter(rows)))
