"""Run by test_clock.py on two ranks: DeepSpeed's collectives within timed steps.

    python ranks_timed.py FOLDER

Rank 1 comes late to the first step. Each rank writes what its clock has seen to FOLDER/RANK.json.
"""

import json
import sys
import time
from pathlib import Path

import torch

from convnext_yolo.recipes.clock import StepClock
from convnext_yolo.recipes.distributed import start_world, stop_world


def busy(seconds: float) -> None:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = start_world()
    from deepspeed.comm import comm

    theirs, clock, steps = comm.comms_logger, StepClock(world.device), []
    comm.barrier()
    for number in range(3):
        with clock.step(measure=number < 2), clock.phase("backward"):
            if world.rank == 1 and number == 0:
                busy(1)
            tensor = torch.ones(1000)
            for _ in range(3):
                comm.all_reduce(tensor)
            comm.all_gather_into_tensor(torch.empty(2000), tensor)
        steps.append(dict(clock.seconds))
        comm.barrier()
    timers = comm.timers.get_timers()
    told = {
        "steps": steps,
        "kinds": sorted(timers),
        "left_in_timers": {name: len(timer.event_timers) for name, timer in timers.items()},
        "enabled_after": comm.comms_logger.enabled,
        "logger_is_back": comm.comms_logger is theirs,
    }
    (folder / f"{world.rank}.json").write_text(json.dumps(told))
    stop_world()
