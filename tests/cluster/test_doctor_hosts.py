"""The doctor over two hosts: what is wrong with one of them, or between them, is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..recipes.conftest import TinyRun
from .cluster import Cluster
from .hosts import SCRATCH, instead, other_deepspeed, wait_for

pytestmark = pytest.mark.process

PORT = 29500
# A clock is the machine's own, whatever the namespace: Python's is put on by PYTHONPATH instead,
# which the doctor hands to the probes.
CLOCK = """
import socket, time
if socket.gethostname() == "nodeB":
    right = time.time
    time.time = lambda: right() + 90
"""


def words(cluster: Cluster, run: TinyRun, *more: object) -> list[str]:
    options = ["--hostfile", cluster.hostfile, *more]
    doctor = [sys.executable, "-m", "convnext_yolo.launch", "doctor", "--config", run.recipe]
    return [str(word) for word in (*doctor, *options)]


def examine(
    cluster: Cluster, run: TinyRun, *more: object, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """The doctor's exit code and what it said, on the first host."""
    process = cluster.hosts[0].start(words(cluster, run, *more), env=env)
    printed, _ = process.communicate(timeout=120)
    for host in cluster.hosts:
        if host.alive:
            wait_for(lambda host=host: not host.processes("doctor.probe"), "the probes end")
    return process.returncode, printed


def test_two_hosts_in_order(
    cluster: Cluster, tiny_run: Callable[..., TinyRun], tmp_path: Path
) -> None:
    run, report = tiny_run("doctor"), tmp_path / "report.json"
    code, printed = examine(cluster, run, "--json", report)
    assert code == 0, printed
    assert "nothing found on 2 hosts: the run may start" in printed
    assert re.search(r"^all-reduce over 2 hosts \(gloo\): [\d.]+ Gbit/s", printed, re.M), printed
    record = json.loads(report.read_text())
    assert record["findings"] == [] and record["bandwidth_gbit"] > 0.01
    assert record["hosts"]["10.77.0.1"]["machine"] != record["hosts"]["10.77.0.2"]["machine"]
    assert not list(run.folder.parent.glob(".doctor-*")) and not run.folder.exists()


def test_a_host_that_is_unlike_the_other(
    cluster: Cluster, tiny_run: Callable[..., TinyRun], tmp_path: Path
) -> None:
    a, b = cluster.hosts
    # data and run on the disk of the first host alone
    run = tiny_run("doctor_unlike", run=str(SCRATCH / "run"))
    shards = yaml_value(run.recipe, "train")
    shutil.copytree(shards, tmp_path / "train")
    a.run(["cp", "-r", tmp_path / "train", SCRATCH])
    recipe = run.recipe.read_text().replace(shards, str(SCRATCH / "train"))
    run.recipe.write_text(recipe)
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with (
        other_deepspeed(b, "0.18.1", tmp_path),
        instead(b, run.recipe, recipe + "seed: 7\n", tmp_path),
    ):
        code, printed = examine(cluster, run, env={"PYTHONPATH": path})
    assert code == 1
    for line in (
        r"error   10\.77\.0\.2: deepspeed is 0\.18\.1, but \S+ on 10\.77\.0\.1;",
        r"error   10\.77\.0\.2: its recipe is another: seed = 7, not 0;",
        r"error   10\.77\.0\.2: data\.train = /run/scratch/train: .*no such shard folder;",
        r"error   10\.77\.0\.2: run: /run/scratch does not show what the first host writes there;",
        r"warning 10\.77\.0\.2: its clock is (89|90) s ahead of this machine's;",
    ):
        assert re.search(f"^{line}", printed, re.M), printed
    assert not re.search(r"^(error|warning) +10\.77\.0\.1:", printed, re.M), printed


def yaml_value(file: Path, key: str) -> str:
    """The first value of a key."""
    match = re.search(rf"^ +{key}: (.+)$", file.read_text(), re.M)
    assert match
    return match[1]


def test_a_port_that_is_blocked_between_hosts(
    cluster: Cluster, tiny_run: Callable[..., TinyRun]
) -> None:
    a, b = cluster.hosts
    rule = ["to", a.address, "ipproto", "tcp", "dport", str(PORT), "prohibit"]
    b.run(["ip", "rule", "add", *rule])
    try:
        code, printed = examine(cluster, tiny_run("doctor_blocked"))
    finally:
        b.run(["ip", "rule", "del", *rule])
    assert code == 1
    assert re.search(
        rf"^error   10\.77\.0\.2: can't reach 10\.77\.0\.1, port {PORT} \(", printed, re.M
    ), printed


def test_names_that_mean_127_0_1_1(
    cluster: Cluster, tiny_run: Callable[..., TinyRun], tmp_path: Path
) -> None:
    a, b = cluster.hosts
    hosts = Path("/etc/hosts")
    names = "".join(f"127.0.1.1 {host.name}\n" for host in cluster.hosts)
    with (
        instead(a, hosts, f"127.0.0.1 localhost\n{names}", tmp_path),
        instead(b, hosts, f"127.0.0.1 localhost\n{names}", tmp_path),
    ):
        without = ["env", "-u", "GLOO_SOCKET_IFNAME"]
        process = a.start([*without, *words(cluster, tiny_run("doctor_names"))])
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(
        r"^error   10\.77\.0\.1, 10\.77\.0\.2: its own name means 127\.0\.1\.1", printed, re.M
    )
    # gloo would call 127.0.1.1 until it gives up: nobody waits for that
    assert "no all-reduce was tried" in printed


def test_a_host_that_is_lost(cluster: Cluster, tiny_run: Callable[..., TinyRun]) -> None:
    _, b = cluster.hosts
    cluster.kill(b)
    started_s = time.monotonic()
    code, printed = examine(cluster, tiny_run("doctor_lost"))
    assert code == 1
    assert re.search(r"^error   10\.77\.0\.2: ssh can't reach it \(", printed, re.M), printed
    assert "no all-reduce was tried" in printed
    assert time.monotonic() - started_s < 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_doctor_that_is_stopped(
    number: int, cluster: Cluster, tiny_run: Callable[..., TinyRun]
) -> None:
    run = tiny_run(f"doctor_stopped_{number}")
    process = cluster.hosts[0].start(words(cluster, run))
    wait_for(
        lambda: all(host.processes("doctor.probe") for host in cluster.hosts), "the probes run"
    )
    process.send_signal(number)
    process.communicate(timeout=30)
    for host in cluster.hosts:
        wait_for(lambda host=host: not host.processes("doctor.probe"), f"{host.name} is clean")
    assert not list(run.folder.parent.glob(".doctor-*"))
