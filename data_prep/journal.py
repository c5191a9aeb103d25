"""Which shards of an unfinished output are done: what a run that was killed goes on from.

A line of JSON for each shard, written after the shard itself is on the disk (and uploaded, where it
goes elsewhere). A line that was cut short counts as none.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .manifest import shard_document, shard_entry
from .tar_writer import Job, Written

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """The journal of a folder of work in progress; the file appears with its first line."""

    def __init__(self, folder: Path):
        self._path = folder / JOURNAL_NAME
        self._lines: dict[str, dict[str, Any]] = {}
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)
        for text in data[:whole].splitlines():
            try:
                line = json.loads(text)
                self._lines[line["shard"]] = line
            except (ValueError, KeyError, TypeError):
                pass

    def get(self, job: Job) -> Written | None:
        """What was noted of a shard made of just this input."""
        line = self._lines.get(job.path.name)
        if line is None or line.get("fingerprint") != job.fingerprint:
            return None
        try:
            refused = [(str(kind), str(sentence)) for kind, sentence in line["refused"]]
            return Written(shard_entry(line["entry"]), int(line["boxes"]), refused)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def add(self, job: Job, written: Written) -> None:
        """Note a shard, durably; one without a tar is not worth it, and is checked again."""
        if written.entry is None:
            return
        line = {
            "shard": job.path.name,
            "fingerprint": job.fingerprint,
            "boxes": written.boxes,
            "refused": written.refused,
            "entry": shard_document(written.entry),
        }
        with self._path.open("a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
