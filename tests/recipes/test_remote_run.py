"""A training whose validation shards lie on a server that is killed in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process


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


def test_a_run_goes_on_when_the_server_is_back(far_run: Callable[..., Any]) -> None:
    run, server = far_run("back", 100)
    process = run.start("alone")
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("training"):
            server.kill()
        elif line.startswith("waiting for 127.0.0.1"):
            server.start()
    assert process.wait() == 0, output
    assert output.count("waiting for") == output.count("answers again") == 1
    assert "AP" in output.partition("answers again")[2]


def test_a_run_ends_when_the_server_stays_away(far_run: Callable[..., Any]) -> None:
    run, server = far_run("gone", 2)
    process = run.start("alone")
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("training"):
            server.kill()
    assert process.wait() == 2, output
    assert "Traceback" not in output
    sentence = f"convnext-yolo train: error: 127.0.0.1:{server.port} has not answered for 2 s ("
    assert output.splitlines()[-1].startswith(sentence)
    server.start()
    assert "resuming at step 8" in run.run("alone")
