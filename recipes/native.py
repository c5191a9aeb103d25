"""DeepSpeed's own checkpoints beside ours, for exchange: `checkpoint.native: true`.

They are written into `RUN/native` and never read by a run: ours resume it. What they miss to stand
alone, the architecture and the classes, goes into DeepSpeed's client state, as plain JSON types.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .checkpoint import published

CLIENT_STATE = "convnext_yolo"  # our key among DeepSpeed's own


def save_native(engine: Any, folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Writes DeepSpeed's checkpoint of this step; all ranks call it.

    Args:
        engine: DeepSpeed's.
        folder: the run's `native`.
        step: global steps done.
        state: what our checkpoint of the step holds beside the tensors; JSON.
        keep: how many native checkpoints up to this one stay.
    """
    tag = f"step-{step:08d}"
    if dist.get_rank() == 0:  # another number of ranks would leave files of its own among these
        shutil.rmtree(folder / tag, ignore_errors=True)
    dist.barrier()
    # Through JSON, or numbers of numpy would come along, which no careful reader accepts.
    client_state = {CLIENT_STATE: json.loads(json.dumps({**state, "step": step}))}
    engine.save_checkpoint(str(folder), tag, client_state)
    dist.barrier()
    if dist.get_rank() == 0:
        for old in [path for path in published(folder) if path.name <= tag][keep:]:
            shutil.rmtree(old)
