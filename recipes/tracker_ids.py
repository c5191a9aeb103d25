"""The trackers' ids of a run, from its start until its first checkpoint has them.

A run that is killed before that begins again with the same numbers: trackers are to take it for the
same run.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from .files import write_whole

IDS = "tracker_ids.json"  # in the run's folder


def keep_ids(folder: Path, course: str, run_ids: Mapping[str, str]) -> None:
    """Keeps the trackers' ids of a run that begins, until its first checkpoint does.

    Args:
        folder: of the run.
        course: whatever decides what the run is going to log.
        run_ids: by tracker.
    """
    write_whole(folder / IDS, json.dumps({"course": course, "ids": dict(run_ids)}))


def kept_ids(folder: Path, course: str) -> dict[str, str]:
    """Those of a run of the same course that was killed before it had published anything."""
    try:
        kept = json.loads((folder / IDS).read_text(encoding="utf-8"))
        return dict(kept["ids"]) if kept["course"] == course else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def forget_ids(folder: Path) -> None:
    """From the first checkpoint on, it has them."""
    (folder / IDS).unlink(missing_ok=True)
