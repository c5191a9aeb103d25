"""DeepSpeed's own checkpoints beside ours, for exchange: `checkpoint.native: true`.

They lie in `native/` inside our checkpoint of the step, published and retired with it, and are
never read by a run: ours resume it. What they miss to stand alone, the architecture and the
classes, goes into DeepSpeed's client state, as plain JSON types.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

CLIENT_STATE = "convnext_yolo"  # our key among DeepSpeed's own
FOLDER = "native"


def save_native(engine: Any, folder: Path, step: int, state: dict[str, Any]) -> list[Path]:
    """Writes DeepSpeed's checkpoint of this step; all ranks call it.

    Args:
        engine: DeepSpeed's.
        folder: of our checkpoint, before it is published.
        step: global steps done.
        state: what our checkpoint of the step holds beside the tensors; JSON.

    Returns:
        The large files that this rank has written; they are not synced.

    Raises:
        OSError: this rank could not write all of its files. No other rank waits for it.
    """
    # Through JSON, or numbers of numpy would come along, which no careful reader accepts.
    client_state = {CLIENT_STATE: json.loads(json.dumps({**state, "step": step}))}
    root, tag = folder / FOLDER, f"step-{step:08d}"
    with _to_the_end(engine) as outcome:
        engine.save_checkpoint(str(root), tag, client_state, save_latest=False)
        if dist.get_rank() == 0:
            outcome.attempt((root / "latest").write_text)(tag)
    if outcome.error:
        raise outcome.error
    return outcome.saved


class _Outcome:
    """What became of this rank's writes."""

    def __init__(self) -> None:
        self.saved: list[Path] = []
        self.error: OSError | None = None

    def attempt(self, write: Callable[..., Any]) -> Callable[..., None]:
        """The same, but that the first error is kept, and nothing is written after it."""

        def attempted(*arguments: Any, **options: Any) -> None:
            try:
                if self.error is None:
                    write(*arguments, **options)
            except OSError as error:
                self.error = error
            except RuntimeError as error:  # PyTorch's writer has no errors of the system's
                self.error = OSError(f"{error}".partition("\n")[0])

        return attempted


@contextmanager
def _to_the_end(engine: Any) -> Iterator[_Outcome]:
    """DeepSpeed's ranks meet between their writes: one that can't write must come all the same."""
    outcome, writer = _Outcome(), engine.checkpoint_engine
    save, makedirs = outcome.attempt(writer.save), outcome.attempt(writer.makedirs)

    def save_and_note(state_dict: Any, path: str) -> None:
        save(state_dict, path)
        outcome.saved.append(Path(path))

    writer.save, writer.makedirs = save_and_note, makedirs
    engine._copy_recovery_script = outcome.attempt(engine._copy_recovery_script)
    try:
        yield outcome
    finally:  # these were the class's own
        del writer.save, writer.makedirs, engine._copy_recovery_script
