"""W&B itself: two sessions of a run, one of them killed, and what `wandb sync` sends of them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.tracking import Tracker, pictures_path
from convnext_yolo.recipes.tracking_wandb import read_history

from .conftest import TinyRun
from .forkserver import ForkServer
from .short_runs import kill_at_step, train

pytestmark = pytest.mark.process

# Logs steps up to 8 and is killed; an evaluation at each multiple of four.
KILLED = """
    import os, sys
    from pathlib import Path
    from convnext_yolo.recipes.load import load_recipe
    from convnext_yolo.recipes.tracking import Tracker

    tracker = Tracker(load_recipe([], []), Path(sys.argv[1]), 0, {})
    print(tracker.run_ids["wandb"], flush=True)
    for step in range(1, 9):
        tracker.log({"kind": "train", "step": step, "box": 0.5})
        if step % 4 == 0:
            tracker.log({"kind": "val", "step": step, "AP": 0.5})
    input()
    os.kill(os.getpid(), 9)
"""
# The service accepts connections and says nothing, for ever.
HUNG = """
    import sys, time
    from pathlib import Path
    from convnext_yolo.recipes import trackers
    from convnext_yolo.recipes.load import load_recipe
    from convnext_yolo.recipes.tracking import Tracker

    trackers.START_LIMIT_S = trackers.STOP_LIMIT_S = 1.0
    recipe = load_recipe([], ["--tracking.wandb", "online"])
    tracker = Tracker(recipe, Path(sys.argv[1]), 0, {})
    tracker.log({"kind": "train", "step": 1, "box": 0.5})
    tracker.close(stop_asked=lambda: True)
    print("closed")
"""


class Service(ThreadingHTTPServer):
    """As much of W&B's service as `wandb sync` asks for; keeps the lines of the history."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ServiceHandler)
        self.history: dict[int, dict[str, Any]] = {}  # by line

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server_port}"
        return {**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity, project = {"id": "e", "name": "entity"}, {"id": "p", "name": "convnext-yolo"}
        bucket = {"id": "b", "name": variables.get("name"), "displayName": "run", "config": "{}"}
        if "RunResumeStatus" in query:
            if not self.history:
                return {"model": None}
            tail = json.dumps(self.history[max(self.history)])
            bucket |= {"historyLineCount": len(self.history), "historyTail": json.dumps([tail])}
            bucket |= {"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"}
            bucket |= {"summaryMetrics": tail, "tags": [], "wandbConfig": "{}"}
            return {"model": {**project, "internalId": "1", "entity": entity, "bucket": bucket}}
        if "UpsertBucket" in query:
            bucket |= {"project": project | {"entity": entity}}
            bucket |= {"historyLineCount": len(self.history)}
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}
        if "CreateRunFiles" in query:
            url = self.environment["WANDB_BASE_URL"]
            names = [{"name": n, "uploadUrl": f"{url}/put/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": names}}
        return {"viewer": {"id": "u", "entity": "entity", "username": "u", "flags": "{}"}}


class ServiceHandler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            part = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            for i, line in enumerate(part["content"] if part else ()):
                self.server.history[part["offset"] + i] = json.loads(line)
        reply = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def python(script: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("left", ["as it is", "torn", "nothing"])
def test_a_killed_run_that_is_gone_on_with_is_one_run_with_each_step_once(
    tmp_path: Path, service: Service, left: str
) -> None:
    with python(KILLED, tmp_path, {**os.environ}) as killed:
        assert killed.stdin and killed.stdout
        run_id = killed.stdout.readline().strip()
        (log,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb")
        deadline_s = time.monotonic() + 60
        while not list(read_history(log)):  # it is flushed every second
            assert time.monotonic() < deadline_s
            time.sleep(0.05)  # between two looks
        killed.communicate("\n")
    assert killed.returncode == -9
    if left == "torn":
        os.truncate(log, log.stat().st_size - 100)
    elif left == "nothing":
        os.truncate(log, 7)
    tracker = Tracker(load_recipe([], []), tmp_path, 6, {"wandb": run_id})
    assert tracker.run_ids == {"wandb": run_id}
    for step in range(7, 13):
        tracker.log({"kind": "train", "step": step, "box": 0.5})
        if step == 8:
            tracker.log({"kind": "val", "step": step, "AP": 0.5})
    tracker.close()

    sessions = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(sessions) == (1 if left == "nothing" else 2)
    rows = [row for s in sessions for row in read_history(s / f"run-{run_id}.wandb")]
    assert [row["step"] for row in rows if "train/box" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "val/AP" in row] == [4, 8]

    words = [str(Path(sys.executable).parent / "wandb"), "sync", *map(str, sessions)]
    sync = subprocess.run(
        words, env=service.environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert sync.returncode == 0, sync.stderr
    assert sync.stderr.count("Finished syncing") == len(sessions)
    sent = [service.history[line] for line in sorted(service.history)]
    assert [(row["step"], row["_step"]) for row in sent] == [(n, n) for n in range(1, 13)]


def test_a_run_that_is_killed_before_its_first_checkpoint_is_the_same_run_again(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    """It gives the same numbers once more; another recipe does not."""
    run = tiny_run("wandb-early", "offline", checkpoint={"every_steps": 1000})
    kill_at_step(fork_server, run, 2)
    train(fork_server, run, 1)
    logs = sorted(run.folder.glob("wandb/offline-run-*/*.wandb"))
    assert len({log.name for log in logs}) == 1
    rows = [row["step"] for log in logs for row in read_history(log) if "train/box" in row]
    assert sorted(rows) == list(range(1, 13))  # each once
    shutil.rmtree(run.folder / "checkpoints")
    train(fork_server, run, 1, "--optimizer.lr", "0.002")
    assert len({log.name for log in run.folder.glob("wandb/offline-run-*/*.wandb")}) == 2


def test_a_log_cut_off_anywhere_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    tracker = Tracker(load_recipe([], []), tmp_path, 0, {})
    for step in range(1, 401):  # more than two of its blocks
        tracker.log({"kind": "train", "step": step, "box": 0.5})
    tracker.close()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    whole, counts = path.read_bytes(), set()
    assert len(whole) > 2 * 32768
    for length in [*range(100), *range(100, len(whole), 997), len(whole)]:
        path.write_bytes(whole[:length])
        steps = [row["step"] for row in read_history(path)]
        assert steps == list(range(1, len(steps) + 1))
        counts.add(len(steps))
    assert {0, 400} < counts


def test_everything_of_a_run_is_there_offline_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    tracker = Tracker(load_recipe([], []), tmp_path, 0, {})
    rates = {"head": 1e-3, "stem": 1e-4}
    tracker.log({"kind": "train", "step": 4, "box": 0.5, "lr_groups": rates})
    tracker.log({"kind": "val", "step": 4, "AP": 0.5})
    path = pictures_path(tmp_path, 4)
    path.parent.mkdir()
    Image.new("RGB", (40, 30)).save(path)
    tracker.log_evaluation(4, {"RBC": {"AP": 0.5}, "WBC": {"AP": 0.4}}, [path])
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    tracker.log_weights(weights)
    tracker.close()
    assert os.environ["WANDB_MODE"] == "offline"
    (session,) = (tmp_path / "wandb").glob("offline-run-*")
    assert session.name.endswith(tracker.run_ids["wandb"])
    log = session / f"run-{tracker.run_ids['wandb']}.wandb"
    (row,) = read_history(log)
    assert row["train/lr_groups/stem"] == 1e-4 and row["val/AP"] == 0.5
    assert row["val/predictions/width"] == 40
    table = json.loads((session / "files" / row["val/per_class/path"]).read_text())
    assert table["columns"] == ["class", "AP"] and table["data"] == [["RBC", 0.5], ["WBC", 0.4]]
    content = log.read_bytes()  # what only `wandb sync` understands
    assert b"layer_decay" in content  # the configuration
    assert str(weights).encode() in content  # the artifact


def test_a_service_that_does_not_answer_keeps_no_process(tmp_path: Path, service: Service) -> None:
    service.shutdown()  # it still listens
    with python(HUNG, tmp_path, service.environment) as hung:
        output, _ = hung.communicate(timeout=60)
    assert hung.returncode == 0, output
    assert "wandb has not finished in time" in output and "closed" in output
    assert "Traceback" not in output
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
