"""DeepSpeed's own checkpoints beside ours, for exchange: `checkpoint.native: true`.

They lie in `native/` inside our checkpoint of the step, published and retired with it, and are
never read by a run: ours resume it. What they miss to stand alone, the architecture and the
classes, goes into DeepSpeed's client state, as plain JSON types.
"""

import json
from pathlib import Path
from typing import Any

CLIENT_STATE = "convnext_yolo"  # our key among DeepSpeed's own
FOLDER = "native"


def save_native(engine: Any, folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes DeepSpeed's checkpoint of this step; all ranks call it.

    Args:
        engine: DeepSpeed's.
        folder: of our checkpoint, before it is published.
        step: global steps done.
        state: what our checkpoint of the step holds beside the tensors; JSON.
    """
    # Through JSON, or numbers of numpy would come along, which no careful reader accepts.
    client_state = {CLIENT_STATE: json.loads(json.dumps({**state, "step": step}))}
    engine.save_checkpoint(str(folder / FOLDER), f"step-{step:08d}", client_state)
