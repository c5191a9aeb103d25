"""The doctor before a launch: hosts that are started by hand, one host, and Slurm's."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.launch.cli import main
from convnext_yolo.launch.doctor import examine as examination
from convnext_yolo.launch.doctor.examine import examine_all
from convnext_yolo.launch.doctor.facts import HostFacts
from convnext_yolo.launch.doctor.meeting import find_busy, find_unknown
from convnext_yolo.launch.doctor.setup import HERE, Examination, Setup
from convnext_yolo.launch.supervision import supervise

from .fake_probes import Scene, port_of_nobody, scene

NO_INTERFACE = ["--env", "NCCL_SOCKET_IFNAME=ib7", "--env", "GLOO_SOCKET_IFNAME=ib7"]


@pytest.fixture
def healthy(tmp_path: Path, tiny_recipe: Callable[..., Path]) -> Iterator[Scene]:
    with scene(tmp_path / "scene", tiny_recipe(tmp_path / "scene")) as found:
        found.hostfile.write_text("localhost slots=1\nother.invalid slots=1\n")
        yield found


@pytest.fixture
def launch(
    healthy: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[bool, str]]:
    """Runs `launch`, but for what it starts: whether it would have, and what the doctor said."""
    asked: list[Setup] = []

    def examine(setup: Setup) -> Any:
        asked.append(setup)
        return examine_all(setup, lambda line: None, healthy._start).findings

    started: list[object] = []
    monkeypatch.setattr(examination, "examine", examine)
    monkeypatch.setattr(supervise, "run", lambda *words: started.append(words))

    def run(*words: object) -> tuple[bool, str]:
        asked.clear()
        started.clear()
        healthy.write()
        code = main(["launch", str(words[0]), "--config", "recipe.yaml", *map(str, words[1:])])
        said = capsys.readouterr().err
        assert code == (0 if started else 2), said
        assert len(asked) == ("--no-doctor" not in words)
        return bool(started), said

    return run


Launch = Callable[..., tuple[bool, str]]


@pytest.fixture
def busy() -> Iterator[int]:
    """A port of this host that somebody listens on."""
    with socket.create_server(("127.0.0.1", port_of_nobody())) as server:
        yield int(server.getsockname()[1])


def by_hand(launcher: str, rank: int, address: str, port: int) -> list[object]:
    """The words of a launch on two hosts, one of which is this one."""
    words: list[object] = [launcher, "--node-rank", rank]
    if launcher == "deepspeed":
        here = ["--hostfile", "hostfile", "--no-ssh"]
        return [*words, *here, "--master-addr", address, "--master-port", port]
    flag = "--master" if launcher == "accelerate" else "--rdzv-endpoint"
    words += ["--nodes", 2, "--processes-per-node", 1, flag, f"{address}:{port}"]
    return words + (["--local-addr", "127.0.0.1"] if launcher == "torchrun" else [])


OPTION = {"torchrun": "--rdzv-endpoint", "accelerate": "--master", "deepspeed": "--master-port"}


@pytest.mark.parametrize("launcher", OPTION)
def test_the_first_host_needs_its_port(launcher: str, launch: Launch, busy: int) -> None:
    started, said = launch(*by_hand(launcher, 0, "127.0.0.1", busy))
    assert not started
    assert f"error   here: port {busy} can't be taken: Address already in use by " in said
    assert f"or give another {OPTION[launcher]}" in said
    # it is host 0's, whatever listens here
    assert launch(*by_hand(launcher, 1, "127.0.0.1", busy)) == (True, "")
    # who does not listen yet is no finding
    assert launch(*by_hand(launcher, 1, "127.0.0.1", port_of_nobody())) == (True, "")


@pytest.mark.parametrize("launcher", OPTION)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_host_needs_the_first_ones_name(launcher: str, rank: int, launch: Launch) -> None:
    started, said = launch(*by_hand(launcher, rank, "host.invalid", port_of_nobody()))
    assert not started and "error   here: host.invalid can't be found (" in said


def test_the_first_name_of_the_hostfile_is_the_default(launch: Launch, busy: int) -> None:
    words = ["deepspeed", "--hostfile", "hostfile", "--no-ssh", "--master-port", busy]
    started, said = launch(*words, "--node-rank", 0)
    assert not started and f"port {busy} can't be taken" in said
    assert launch(*words, "--node-rank", 1) == (True, "")


@pytest.mark.parametrize("launcher", OPTION)
def test_ranks_started_by_hand_need_their_interfaces(launcher: str, launch: Launch) -> None:
    words = by_hand(launcher, 1, "127.0.0.1", port_of_nobody())
    started, said = launch(*words, *NO_INTERFACE)
    assert not started and "error   here: GLOO_SOCKET_IFNAME=ib7, but its interfaces are" in said


def test_one_host_picks_its_own_port(launch: Launch, busy: int) -> None:
    assert launch("local", "--processes", 1) == (True, "")
    one = ["torchrun", "--processes-per-node", 1, "--rdzv-endpoint", f"127.0.0.1:{busy}"]
    assert launch(*one) == (True, "")


def test_a_port_is_looked_at_without_answering_calls(
    monkeypatch: pytest.MonkeyPatch, busy: int
) -> None:
    """Ranks of other hosts may be calling already, and must not take us for the first one."""
    free, heard = port_of_nobody(), []
    monkeypatch.setattr(socket.socket, "listen", lambda *words: heard.append(words))
    assert find_busy(free) == "" and not heard
    assert find_busy(busy).startswith("Address already in use")
    assert find_unknown("[::1]") == find_unknown("127.0.0.1") == ""
    assert find_unknown("host.invalid") != ""


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("a b=c", "error   --env: a b=c: 'a b' is no variable's name;"),
        ("NCCL_SOCKET_IFNAME=ib7", "error   here: NCCL_SOCKET_IFNAME=ib7, but its interfaces are"),
        ("NOWHERE_SET", "error   --env: NOWHERE_SET: it is not set here;"),
    ],
)
def test_variables_are_looked_at_without_a_hostfile(word: str, line: str, healthy: Scene) -> None:
    healthy.alter(hostfile=None, processes=1, env=[word])
    [finding] = healthy.findings()
    assert str(finding).startswith(line)
    healthy.alter(env=["2=3", word])  # one that is wrong hides no other
    assert [str(finding).partition(";")[0] for finding in healthy.findings()] == [
        "error   --env: 2=3: '2' is no variable's name",
        str(finding).partition(";")[0],
    ]


# Slurm

SLURM = ["slurm", "--nodes", 2, "--processes-per-node", 2]


def test_slurm_is_asked_of_what_all_hosts_share(healthy: Scene, launch: Launch) -> None:
    started, said = launch(*SLURM)
    assert started and "4 ranks, but only 3 shard(s)" in said
    healthy.set("deepspeed.options.nebula", {})
    healthy.set("data.train", "/nowhere")
    (healthy.folder / "run/checkpoints/step-00000004").mkdir(parents=True)
    started, said = launch(*SLURM, "--resume", "never")
    assert not started
    lines = said.splitlines()
    assert [line.partition(":")[0] for line in lines[:-2]] == [
        "error   deepspeed.options.nebula",
        "error   here",
        f"error   --resume never, run = {healthy.recipe['run']}",
    ]
    assert "data.train = /nowhere: no such shard folder" in lines[1]
    assert lines[1].endswith("(or, if only the job's hosts have it, add --no-doctor)")
    assert lines[-1].endswith("mend them, or add --no-doctor")
    assert not (healthy.folder / "run/launch").exists()
    assert launch(*SLURM, "--no-doctor") == (True, "")


def test_slurm_has_too_few_samples(healthy: Scene, launch: Launch) -> None:
    healthy.set("batch", {"global": 128, "micro": 1})
    started, said = launch("slurm", "--nodes", 16, "--processes-per-node", 8)
    assert not started and "128 ranks, but only 72 samples" in said


def test_the_submitting_host_is_not_judged(healthy: Scene, launch: Launch) -> None:
    """It has no GPU, no room and no interface; the job's hosts may."""
    gpu = {"index": 0, "name": "A100", "total_mib": 100, "used_mib": 99, "mode": "Prohibited"}
    bad = {"gpus": [gpu], "torch_gpus": 0, "shm_free_bytes": 0, "cores": 1, "has_compiler": False}
    bad |= {"accelerator": "cpu", "versions": {}, "trackers": ["tracking.wandb: no; mend"]}
    healthy.fact(HERE, **bad, cache={"place": "/cache", "error": "Permission denied"})
    healthy.set("data.workers", 4)
    healthy.set("deepspeed.compile", True)
    os.environ["NCCL_SOCKET_IFNAME"] = "ib7"
    started, said = launch("slurm", "--processes-per-node", 2)
    assert (started, said) == (True, "")
    assert launch("local", "--processes", 1)[0] is False
    assert HostFacts.model_fields.keys() > bad.keys()


def test_a_run_folder_without_room_counts_for_slurm(healthy: Scene, launch: Launch) -> None:
    healthy.on(HERE)(lambda answer: answer["run"].update(free_bytes=2**20))
    started, said = launch("slurm", "--processes-per-node", 2)
    assert not started and "has 1 MiB free, its checkpoints will take" in said


# What it needs of the disk


def test_the_cache_of_shards_at_urls(tmp_path: Path, healthy: Scene) -> None:
    from convnext_yolo.launch.doctor.data import cache_folder

    urls = {"train": "s3://a/train", "val": "shards/val", "cache": str(tmp_path / "cache")}
    assert cache_folder({**urls, "train": "shards/train"}) is None  # it is for URLs
    found = cache_folder(urls)
    assert found is not None and found.place == str(tmp_path) and found.error == ""
    assert found.free_bytes > 0 and found.used_bytes == 0
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache/chunks").mkdir(parents=True)
    (tmp_path / "cache/chunks/usage").write_text(f"{5000:020}")
    found = cache_folder(urls)
    assert found is not None and found.used_bytes == 5000
    assert found.place == str(tmp_path / "cache/chunks")
    refused = cache_folder({**urls, "cache": "/proc/self/cache"})
    assert refused is not None and refused.error


def test_figures_that_can_not_be_written_are_told_at_once(
    healthy: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*words: object) -> Examination:
        raise AssertionError("the examination takes seconds")

    monkeypatch.setattr(examination, "examine_all", never)
    healthy.write()
    words = ["doctor", "--config", "recipe.yaml", "--json", str(healthy.folder)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{healthy.folder}: can't be written (Is a directory)" in error
    assert error.count("\n") == 1
