"""A data set and a recipe small enough to train in seconds, and the processes that do it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from convnext_yolo.data_prep.formats import read_coco
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.recipes.export import export
from convnext_yolo.recipes.tracking import read_metrics

from .forkserver import ForkServer

BIN = Path(sys.executable).parent
STEPS = 12


@dataclass(frozen=True)
class TinyRun:
    """A recipe file and the folder that it trains into."""

    recipe: Path
    folder: Path
    steps: int = STEPS

    def words(self, launcher: str, *options: str) -> list[str]:
        """The command line of a run of two processes under a launcher."""
        train = ["train", "--config", str(self.recipe), *options]
        module = ["convnext_yolo.launch", *train]
        port = str(free_port())
        return {
            "deepspeed": [
                *(str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port),
                *("--no_local_rank", "--module", *module),
            ],
            "torchrun": [
                *(str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port),
                *("-m", *module),
            ],
            # --multi_gpu is accelerate's name for starting several processes, on CPUs too.
            "accelerate": [
                *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"),
                *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
                *("--main_process_port", port, "-m", *module),
            ],
            "launch local": [
                *(str(BIN / "convnext-yolo"), "launch", "local", "--processes", "2"),
                "--no-doctor",
                *train[1:],
            ],
        }[launcher]

    def start(self, launcher: str, *options: str) -> subprocess.Popen[str]:
        """Starts it, in a process group of its own."""
        return subprocess.Popen(
            self.words(launcher, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=environment(),
        )

    def run(self, launcher: str, *options: str) -> str:
        """Runs it to its end; returns what it printed."""
        process = self.start(launcher, *options)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
        return output

    def kill_after(
        self, launcher: str, step: int, number: int = signal.SIGKILL, front_only: bool = False
    ) -> str:
        """Starts it, and signals it once a step is in the metrics; returns what it printed.

        The signal goes to every process of it, or to the one that was started. In both cases
        none may be left when that one has ended.
        """
        process = self.start(launcher)
        deadline_s = time.monotonic() + 200
        while max((r["step"] for r in read_metrics(self.folder)), default=0) < step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline_s, "no step in time"
            time.sleep(0.01)  # between two looks
        (os.kill if front_only else os.killpg)(process.pid, number)
        output, _ = process.communicate(timeout=100)
        assert not processes_with(str(self.recipe))
        return output

    def losses(self) -> list[dict[str, float]]:
        """The training losses of each step."""
        records = [r for r in read_metrics(self.folder) if r["kind"] == "train"]
        assert [r["step"] for r in records] == list(range(1, STEPS + 1))
        names = [name for name in ("box", "obj", "cls", "dfl") if name in records[0]]
        return [{name: r[name] for name in names} for r in records]

    def sha256(self) -> str:
        """The hash of the weights that `export` writes."""
        return export(self.folder, self.folder / "w.safetensors")[0]


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def processes_with(word: str) -> list[str]:
    """Command lines of living processes that have a word in them, ours excepted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if word in words and int(path.parent.name) != os.getpid():
            found.append(" ".join(words))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts ranks without the seconds that imports take."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, datasets: Path) -> Path:
    """The bundled cells' validation pictures, and for evaluations the first of them."""
    folder = tmp_path_factory.mktemp("shards")
    cells = read_coco(datasets / "bccd/instances_val.json", datasets / "bccd/images/val")
    shard_dataset(cells, folder / "train", samples_per_shard=30, progress=False)
    # Few: most runs end with an evaluation that no test looks at.
    cells.images[24:] = []
    shard_dataset(cells, folder / "val", samples_per_shard=10, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyRun]:
    """Makes a run: `tiny_run("name", **sections)`."""

    def make(name: str, wandb: str = "off", workers: int = 1, **sections: object) -> TinyRun:
        tmp_path = tmp_path_factory.mktemp(name)
        recipe = {
            "run": str(tmp_path / name),
            "model": {
                "name": "seed_convnext_yolo",  # its BatchNorm is what is hard to hold together
                # stochastic depth, so that random numbers inside the network matter as well
                "backbone": {"name": "test_convnext", "options": {"drop_path_rate": 0.2}},
                "adapter_channels": [16, 24, 33],  # 33: sizes that two ranks can't halve
                "neck_channels": [16, 24, 34],
            },
            "data": {
                "train": str(tiny_shards / "train"),
                "val": str(tiny_shards / "val"),
                "image_px": [64, 96],
                "workers": workers,
            },
            "batch": {"global": 8, "micro": 2},
            "schedule": {"epochs": STEPS / 9, "warmup_epochs": 0.3},
            "ema": {"decay": 0.9, "ramp_steps": 5},
            "deepspeed": {"stage": 2},
            "checkpoint": {"every_steps": 4, "keep": 3},
            "evaluation": {"every_epochs": 100},
            "tracking": {"wandb": wandb, "log_every": 1},
            **sections,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return TinyRun(path, tmp_path / name)

    return make
