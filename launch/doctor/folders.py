"""Folders that a run is going to make: the nearest one above that exists tells of them."""

import shutil
import tempfile
from pathlib import Path


def existing(folder: Path) -> Path:
    """The folder, or the nearest path above it that exists: a file, if one is in the way."""
    return next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path("/"))


def unwritable(folder: Path) -> str:
    """Why nothing can be written into a folder; empty if something can."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"can this be written?")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def free_bytes(folder: Path) -> int:
    """The room on a folder's disk."""
    return shutil.disk_usage(folder).free
