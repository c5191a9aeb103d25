"""Which checkpoints stay: the newest few and the best. Runs after a publication alone.

Invariant: what was just published is never deleted, and nothing loses its name before it is renamed
away, so that a kill leaves no half of a checkpoint under the name of a whole one.
"""

import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import REPLACED, CheckpointError, open_checkpoint, published
from .files import sync_folder, write_synced

LATEST, BEST = "latest", "best"  # files that hold the name of a checkpoint


class Retention:
    """Keeps a folder of checkpoints. For the main rank only.

    Args:
        folder: the run's `checkpoints`.
        keep: how many of the newest stay.
        keep_best: whether the one with the highest AP stays as well.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool):
        self.folder, self.keep, self.keep_best = folder, keep, keep_best
        self._deleting: threading.Thread | None = None  # what is not kept any more

    def clean(self) -> None:
        """Waits for what is being deleted, and deletes what a run left that was killed."""
        if self._deleting:
            self._deleting.join()
        for left in self.folder.glob("*.partial"):
            _remove(left)
        for replaced in self.folder.glob("*" + REPLACED):
            if replaced.with_suffix("").exists():
                _remove(replaced)
            else:  # its successor was never published
                replaced.rename(replaced.with_suffix(""))

    def point(self, pointer: str, name: str) -> None:
        """Makes `latest` or `best` name a checkpoint."""
        partial = self.folder / f"{pointer}.partial"
        write_synced(partial, name)
        partial.replace(self.folder / pointer)
        sync_folder(self.folder)

    def _point_or_not(self, pointer: str, path: Path | None) -> None:
        if path:
            self.point(pointer, path.name)
        else:
            (self.folder / pointer).unlink(missing_ok=True)

    def publish(self, partial: Path) -> Path:
        """Gives a complete checkpoint its name.

        Of its step there is one already where the run came back to it: damaged, or without its
        evaluation.

        Raises:
            OSError: it is not published; what fails later is only told.
        """
        final = partial.with_suffix("")
        replaced = final.rename(final.with_suffix(REPLACED)) if final.exists() else None
        partial.rename(final)
        sync_folder(self.folder)
        try:
            if replaced:
                _remove(replaced)
            self.point(LATEST, final.name)
            self.retire()
        except OSError as error:
            print(f"warning: {self.folder}: can't be tidied up ({error})", file=sys.stderr)
        return final

    def leave(self, step: int) -> None:
        """Sets aside what is newer than the checkpoint of `step`, which the run goes on from.

        It is of a branch that the run leaves, by `--resume PATH`, or it is damaged. It would win
        the next `--resume auto`, when metrics.jsonl already tells of the new branch.

        Raises:
            OSError: it can't be renamed.
        """
        newer = [p for p in published(self.folder) if p.name > f"step-{step:08d}{REPLACED}"]
        for path in newer:
            aside = set_aside(path)
            print(f"{path.name} is not of this run's past: now {aside}", file=sys.stderr)
        if newer:
            left = published(self.folder)
            self._point_or_not(LATEST, left[0] if left else None)
            self._point_or_not(BEST, best_of(left) if self.keep_best else None)

    def retire(self) -> None:
        """Keeps the last few, of which the first was just published, and the best."""
        present, gone = published(self.folder), []
        spared = set(present[: self.keep])
        if self.keep_best and (best := best_of(present)):
            self.point(BEST, best.name)
            spared.add(best)
        for old in present:
            if old not in spared:
                # Renamed first: a kill in the middle leaves no half of one under its name.
                gone.append(old.rename(old.with_name(old.name + ".partial")))
        if gone:  # which takes a file system longer than all the rest here
            self._deleting = threading.Thread(target=_delete, args=(gone,))
            self._deleting.start()


def _delete(paths: Sequence[Path]) -> None:
    for path in paths:
        _remove(path)


def _remove(path: Path) -> None:
    """As far as it can: another may be at it, and what stays hinders nobody but its own name."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def best_of(paths: Sequence[Path]) -> Path | None:
    """The checkpoint whose own evaluation gave the highest AP; of equals the newest."""
    scores = []
    for path in paths:
        try:
            found = open_checkpoint(path)
        except CheckpointError:
            continue
        if found.state.get("evaluated_step") == found.step:
            scores.append((found.state["metrics"]["AP"], found.step, path))
    return max(scores)[2] if scores else None


def set_aside(path: Path) -> Path:
    """Gives a checkpoint a name by which it is not gone on from."""
    aside = path.with_name("set-aside-" + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)
