"""ZeRO does what it is for: a rank's share of the optimizer's state falls as 1 / ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .forkserver import ForkServer

SCRIPT = str(Path(__file__).with_name("ranks_optimizer_state.py"))


@pytest.mark.process
def test_it_falls_as_one_over_ranks(fork_server: ForkServer, tiny_run: Callable[..., Any]) -> None:
    options = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    run = tiny_run("state", deepspeed={"options": options})
    held: dict[tuple[str, int], list[int]] = {}
    for ranks in (1, 2, 4):
        fork_server.run(ranks, SCRIPT, str(run.recipe), *"0123")
        for stage in "0123":
            notes = run.recipe.parent.glob(f"{run.recipe.name}.zero{stage}-ranks{ranks}-rank*")
            held[stage, ranks] = [int(note.read_text()) for note in notes]
    [whole] = held["0", 1]
    assert whole >= 2 * 4 * 235_000  # two fp32 moments a parameter
    for ranks in (1, 2, 4):
        assert held["0", ranks] == [whole] * ranks  # nothing is shared at stage 0
        for stage in "123":
            assert len(held[stage, ranks]) == ranks
            for count in held[stage, ranks]:
                assert count == pytest.approx(whole / ranks, rel=0.1), (stage, ranks)
