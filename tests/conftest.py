"""What every test may rely on: one thread, a loud answer for missing components, the extra data."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported, here and in the processes that tests start: the ranks of a test share
# few cores, and sums are taken in one order only with one thread.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
# Nothing in the tests may wait for the network or report to anybody.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

# A shell's background job ignores Ctrl-C, and hands that down to what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# component: (programs, any of which will do; how to get one)
_COMPONENTS = {
    "chromium": (("chromium", "chromium-browser", "google-chrome"), "apt-get install chromium"),
    "git": (("git",), "apt-get install git"),
    "pdsh": (("pdsh",), "apt-get install pdsh"),
    "shellcheck": (("shellcheck",), "apt-get install shellcheck"),
}


@pytest.fixture(scope="session")
def component() -> Callable[[str], Path]:
    """Find a program that pip cannot install, as in `component("chromium")`.

    Missing, it skips the test with the way to get it; under CI, where skipping would hide that a
    part of the suite never runs, it fails the test.
    """

    def find(name: str) -> Path:
        programs, remedy = _COMPONENTS[name]
        for program in programs:
            if path := shutil.which(program):
                return Path(path)
        reason = f"{name} is not installed ({remedy})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)

    return find


@pytest.fixture(scope="session")
def datasets() -> Path:
    """The bundled data: `datasets / "bccd"`, `datasets / "coco_mini"`."""
    return ROOT / "data_prep" / "datasets"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """More real data, beside the repository on the developers' machines only."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs ../shared/data, which is not part of the project")
    return path


class ShardServer:
    """A process that serves folders of shards, `url(name)`, over "http" or "s3"."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.start()

    def url(self, name: str) -> str:
        host = "s3://bucket" if self.kind == "s3" else f"http://127.0.0.1:{self.port}"
        return f"{host}/{name}"

    def start(self) -> None:
        """Starts it, also after a kill; it serves when this returns."""
        script = str(Path(__file__).with_name("serve_shards.py"))
        words = [sys.executable, script, self.kind, str(self.port), str(self.folder)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        with self.process.stdout as output:  # it says nothing more
            assert output.readline() == "serving\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ShardServer]]:
    """Starts servers, `serve_shards("s3", folder)`; for s3 the environment says where it is."""
    servers: list[ShardServer] = []

    def serve(kind: str, folder: Path) -> ShardServer:
        servers.append(ShardServer(kind, folder))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers[-1].port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        return servers[-1]

    yield serve
    for server in servers:
        server.kill()
