"""Run by test_meter.py on some ranks: a training in which one rank computes longer.

    python ranks_uneven.py RANK SECONDS RECIPE [OPTION …]

RANK needs SECONDS more for each forward pass.
"""

import os
import sys
import time
from typing import Any

from convnext_yolo.launch.cli import main
from convnext_yolo.recipes import train

if __name__ == "__main__":
    rank, seconds, recipe, *options = sys.argv[1:]
    forward: Any = train.forward

    def longer(*arguments: Any) -> Any:
        end_s = time.perf_counter() + float(seconds)
        losses = forward(*arguments)
        time.sleep(max(0.0, end_s - time.perf_counter()))
        return losses

    if os.environ["RANK"] == rank:
        setattr(train, "forward", longer)  # noqa: B010, mypy takes it for a mistake
    sys.exit(main(["train", "--config", recipe, *options]))
