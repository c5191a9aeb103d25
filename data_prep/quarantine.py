"""The quarantine: which samples of a run's data could not be used, and when there are too many."""

import errno
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .batch import Corrupt
from .errors import DataError

LEDGER_NAME = "quarantine.jsonl"


class Quarantine:
    """A ledger of corrupt samples, one JSON line each: shard, key, reason.

    Every rank is told of the same training samples and keeps the same list, so all of them stop at
    the same step; one of them writes.

    Args:
        folder: of the run; what an earlier part of the run has written there counts.
        shard: name of any training shard, as errors give it.
        samples: how many they hold.
        limit: share of them that may be corrupt.
        writes: whether this process keeps the file.

    Raises:
        DataError: the ledger can't be read.
    """

    def __init__(self, folder: Path, shard: str, samples: int, limit: float, writes: bool):
        self.path, self.writes = folder / LEDGER_NAME, writes
        self.samples, self.limit = samples, limit
        self._written = self._read()
        self._pending: list[Corrupt] = []  # not in the file yet
        beside = shard.rpartition("/")[0]
        self._corrupt = {place for place in self._written if place[0].rpartition("/")[0] == beside}

    def add(self, found: Iterable[Corrupt]) -> list[Corrupt]:
        """Writes down training samples; returns those that are new.

        Raises:
            DataError: they have become too many.
        """
        met = dict.fromkeys(found)
        new = [corrupt for corrupt in met if _place(corrupt) not in self._corrupt]
        self._corrupt |= {_place(corrupt) for corrupt in new}
        self.note(new)
        # Not what an earlier part of the run has found alone: it may be mended since.
        if met and len(self._corrupt) > self.limit * self.samples:
            raise DataError(
                f"{len(self._corrupt)} of {self.samples} samples are corrupt, more than "
                f"data.corrupt_limit = {self.limit:g} allows; {self.path} lists them, and "
                "`convnext-yolo verify --images` finds all such: fetch or make the shards again"
            )
        return new

    def note(self, found: Iterable[Corrupt]) -> None:
        """Writes samples down without a limit, those of validation: they have no substitutes."""
        found = dict.fromkeys(found)
        new = [corrupt for corrupt in found if _place(corrupt) not in self._written]
        self._written |= {_place(corrupt) for corrupt in new}
        self._pending += new
        if self._pending and self.writes:
            self._write()

    def _write(self) -> None:
        """Appends what is pending; on a full disk it waits, and training goes on."""
        lines = "".join(json.dumps(asdict(corrupt)) + "\n" for corrupt in self._pending).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(lines) < len(lines):  # the last that fitted
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            why = f"{error.strerror}; written down later, while training goes on"
            print(f"warning: {self.path}: can't be written ({why})", file=sys.stderr, flush=True)
            return
        self._pending.clear()

    def _read(self) -> set[tuple[str, str]]:
        try:
            text = self.path.read_text(encoding="utf-8")
            whole, _, torn = text.rpartition("\n")
            if torn and self.writes:  # a machine that went down while it wrote
                self.path.write_text(whole + "\n" if whole else "", encoding="utf-8")
            entries = [json.loads(line) for line in whole.splitlines()]
            return {(entry["shard"], entry["key"]) for entry in entries}
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}: the quarantine ledger can't be read ({error}); mend or remove it"
            ) from None


def _place(corrupt: Corrupt) -> tuple[str, str]:
    return corrupt.shard, corrupt.key
