"""Weights & Biases: offline by default, for `wandb sync RUN/wandb` whenever one likes.

Each session of a run is a folder of its own with the run's one id; `wandb sync` sends them in order
of time, as one run. Steps that a session repeats would be renumbered there, and a session that was
killed lacks its last second: so a session begins with what those before it do not hold, which is
read from their logs.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .config import Recipe
from .trackers import FINISH_LIMIT_S, Key, Record, columns, numbers

FLUSH_EVERY_S = 1.0
# W&B's log: LevelDB's format behind a header with the version. Blocks of records of
# crc (4 bytes), length (2), kind (1: whole; 2, 3, 4: first, middle, last part).
HEADER, BLOCK_BYTES, RECORD_HEADER_BYTES = b":W&B\xe1\xbe\x00", 32768, 7


def new_id() -> str:
    """An id for a new run."""
    return secrets.token_hex(4)


def load(recipe: Recipe) -> None:
    """Imports all that is going to be needed; raises ImportError."""
    # Nothing leaves the machine unless the recipe says so, whatever the environment says.
    os.environ["WANDB_MODE"] = recipe.tracking.wandb
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    import wandb
    from PIL import Image

    wandb.Table(columns=["n"], data=[[0]])  # imports pandas, where it is installed
    Image.preinit()


def abandon() -> None:
    """Ends W&B's service, for which its exit hook would wait. Its log keeps what was not sent."""
    from wandb.sdk import wandb_setup

    connection: Any = wandb_setup.singleton()._connection
    if connection and connection._proc:
        connection._cleanup()  # unregisters the hook
        connection._proc._process.kill()
        connection._proc._process.wait()


class WandB:
    """A run of W&B, see `Backend`."""

    def __init__(self, recipe: Recipe, folder: Path, run_id: str):
        import wandb

        self.folder, self.run_id, self.wandb = folder, run_id, wandb
        self.is_offline = recipe.tracking.wandb == "offline"
        for log in self._logs():
            mend(log)
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            finish_timeout=FINISH_LIMIT_S,
            x_transaction_log_flush_interval=FLUSH_EVERY_S,
        )
        self.run = wandb.init(
            project=recipe.tracking.project,
            dir=str(folder),
            id=run_id,
            resume="allow",
            name=folder.name,
            config=recipe.model_dump(mode="json", by_alias=True),
            settings=settings,
        )
        self.run.define_metric("step", hidden=True)
        for kind in ("train", "val"):
            self.run.define_metric(f"{kind}/*", step_metric="step")

    def held(self, records: Sequence[Record]) -> set[Key]:
        if not self.is_offline:  # the server says what it has; what it lacks of a step stays so
            return {(r["kind"], r["step"]) for r in records if r["step"] < self.run.step}
        held = set()
        for log in self._logs():
            for row in read_history(log):
                kinds = {name.split("/")[0] for name in row if "/" in name}
                held |= {(kind, row["step"]) for kind in kinds if "step" in row}
        return held

    def log(self, record: Record) -> None:
        self._log(numbers(record), record["step"])

    def table(self, name: str, rows: Sequence[Record], step: int) -> None:
        head = columns(rows)
        table = self.wandb.Table(columns=list(head), data=[[row[c] for c in head] for row in rows])
        self._log({name: table}, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._log({name: self.wandb.Image(str(path))}, step)

    def artifact(self, path: Path) -> None:
        artifact = self.wandb.Artifact(f"weights-{self.run_id}", type="model")
        # immutable: the file is sent from where it is, without a copy in W&B's own folders.
        artifact.add_file(str(path), policy="immutable")
        self.run.log_artifact(artifact)

    def close(self) -> None:
        self.run.finish()
        # Else W&B's exit hook does so, with a traceback where a launcher killed its service.
        self.wandb.teardown()

    def _logs(self) -> list[Path]:
        """Of all sessions, in order."""
        return sorted(self.folder.glob(f"wandb/*run-*-{self.run_id}/run-{self.run_id}.wandb"))

    def _log(self, values: dict[str, Any], step: int) -> None:
        # W&B's own count of steps moves on where it has seen a step; `step` is what is plotted.
        self.run.log({"step": step, **values}, step=step)


def read_history(log: Path) -> Iterator[dict[str, Any]]:
    """The rows of a session's log, as far as they were written."""
    for record, _ in _records(log):
        if record.HasField("history"):
            items = record.history.item
            yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def mend(log: Path) -> None:
    """Cuts off what a kill left of a record, and removes a session of which nothing is there.

    Else `wandb sync` would stop at it, and leave the later sessions. A log that looks otherwise
    than we know stays as it is.
    """
    size = log.stat().st_size
    ends = [end for _, end in _records(log)]
    if ends and ends[-1] < size:
        os.truncate(log, ends[-1])
    elif not ends and size < BLOCK_BYTES and log.read_bytes().startswith(HEADER):
        shutil.rmtree(log.parent)


def _records(log: Path) -> Iterator[tuple[Any, int]]:
    """The whole records of a log, each with where it ends."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto import wandb_internal_pb2

    parse: Callable[[bytes], Any] = vars(wandb_internal_pb2)["Record"].FromString
    for message, end in _messages(log.read_bytes()):
        try:
            yield parse(message), end
        except DecodeError:
            return


def _messages(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole messages of a log, which may end anywhere, each with where it ends."""
    if not data.startswith(HEADER):
        return
    at, message = RECORD_HEADER_BYTES, b""  # the file's header is as long as a record's
    while at + RECORD_HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < RECORD_HEADER_BYTES:  # padding
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += RECORD_HEADER_BYTES
        if kind == 0 or at + length > len(data):
            return
        message = data[at : at + length] if kind in (1, 2) else message + data[at : at + length]
        at += length
        if kind in (1, 4):
            yield message, at
