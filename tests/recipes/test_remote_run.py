"""A training whose validation shards lie on a server that is killed in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .forkserver import ForkServer
from .short_runs import TRAIN

pytestmark = pytest.mark.process
NO_PROXY = {"no_proxy": "127.0.0.1"}  # the fork server is older than `serve_shards`


@pytest.fixture
def far_run(
    tiny_run: Callable[..., Any],
    tiny_shards: Path,
    serve_shards: Callable[..., Any],
    tmp_path: Path,
) -> Callable[..., tuple[Any, Any]]:
    """Makes a run that comes to its validation shards at its end, and their server."""

    def make(name: str, patience_s: float) -> tuple[Any, Any]:
        server = serve_shards("http", tiny_shards)
        data = {
            "train": str(tiny_shards / "train"),
            "val": server.url("val"),
            "cache": str(tmp_path / "cache"),
            "patience_s": patience_s,
            "image_px": [64, 96],
            "workers": 1,
        }
        return tiny_run(name, data=data), server

    return make


def test_a_run_goes_on_when_the_server_is_back(
    fork_server: ForkServer, far_run: Callable[..., Any]
) -> None:
    run, server = far_run("back", 100)
    job = fork_server.start(1, *TRAIN, str(run.recipe), **NO_PROXY)
    job.wait_for_line("training")
    server.kill()
    job.wait_for_line("waiting for 127.0.0.1")
    server.start()
    assert job.wait() == [0], job.output
    assert job.output.count("waiting for") == job.output.count("answers again") == 1
    assert "AP" in job.output.partition("answers again")[2]


def test_a_run_ends_when_the_server_stays_away(
    fork_server: ForkServer, far_run: Callable[..., Any]
) -> None:
    run, server = far_run("gone", 2)
    job = fork_server.start(1, *TRAIN, str(run.recipe), **NO_PROXY)
    job.wait_for_line("training")
    server.kill()
    assert job.wait() == [1], job.output  # no mistake: --max-restarts may start it again
    assert "Traceback" not in job.output
    sentence = f"convnext-yolo train: error: 127.0.0.1:{server.port} has not answered for 2 s ("
    assert job.output.splitlines()[-1].startswith(sentence)
    server.start()
    assert "resuming at step 8" in fork_server.run(1, *TRAIN, str(run.recipe), **NO_PROXY)
