"""The checkpoint that a run would go on from, as this host finds it.

By manifests and sizes: hashes take as long as reading all of it, and ranks compare them anyway.
`recipes.checkpoint` is imported only where there is something to look at, since it needs torch.
"""

from pathlib import Path


def published_in(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    folder = run / "checkpoints"
    if not any(folder.glob("step-*")):
        return []
    from ...recipes.checkpoint import published

    return published(folder)


def resume_error(run: Path, resume: str) -> str:
    """What `train` would refuse to go on from; empty if nothing.

    Args:
        run: the run's folder.
        resume: "auto", "never" (which is no matter of what there is in them) or a checkpoint.
    """
    if resume == "never":
        return ""
    if resume != "auto":
        reason = _reason(Path(resume))
        mend = "give a folder RUN/checkpoints/step-…, or auto"
        return f"--resume {resume}: {reason}; {mend}" if reason else ""
    reasons = []
    for path in published_in(run):
        reasons.append(_reason(path))
        if not reasons[-1]:
            return ""
    if not reasons:
        return ""
    what = f"none of the checkpoints in {run / 'checkpoints'} can be used ({reasons[0]})"
    return f"--resume auto: {what}; remove that folder or choose another --run"


def _reason(path: Path) -> str:
    """Why a checkpoint can't be used; empty if it can."""
    if not path.is_dir():
        return "no such folder"
    from ...recipes.checkpoint import CheckpointError, open_checkpoint

    try:
        parts = open_checkpoint(path).parts
    except CheckpointError as error:
        return str(error).removeprefix(f"checkpoint {path}: ")
    for name, part in parts.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != part["bytes"]:
            return f"{name} has {size} bytes, the manifest says {part['bytes']}"
    return ""
