"""The doctor's parts: real probes, ssh's words, what it claims of DeepSpeed, the command itself."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.launch.doctor import examine as examination
from convnext_yolo.launch.doctor import recipe as recipe_checks
from convnext_yolo.launch.doctor.data import shards, some_chunks
from convnext_yolo.launch.doctor.environment import check_environment_files, check_interfaces
from convnext_yolo.launch.doctor.examine import examine, examine_all
from convnext_yolo.launch.doctor.facts import HostFacts, Meeting, Shards
from convnext_yolo.launch.doctor.findings import (
    error,
    exit_code,
    format_findings,
    merged,
    several,
    warning,
)
from convnext_yolo.launch.doctor.host import differing_key, host_facts, parse_gpus, sources
from convnext_yolo.launch.doctor.hosts import compare_hosts
from convnext_yolo.launch.doctor.machine import check_skew
from convnext_yolo.launch.doctor.meeting import bandwidth_gbit, connect, listen
from convnext_yolo.launch.doctor.network import check_start
from convnext_yolo.launch.doctor.session import ProbeError, ProbeSession, greet, ssh_words
from convnext_yolo.launch.doctor.setup import Examination, Setup
from convnext_yolo.launch.doctor_commands import COMMANDS
from convnext_yolo.launch.parser import Parser

from .fake_probes import Scene, port_of_nobody, scene

# As ssh does it, but here: the last argument is a line for a shell.
LOCAL_SSH = 'for line; do :; done\nexec sh -c "$line"'


@pytest.fixture
def healthy(tmp_path: Path, tiny_recipe: Callable[..., Path]) -> Iterator[Scene]:
    with scene(tmp_path / "scene", tiny_recipe(tmp_path / "scene")) as found:
        yield found


def doctor(*words: object) -> int:
    """The command line's `doctor`."""
    parser = Parser("convnext-yolo")
    commands = parser.add_subparsers(required=True)
    for add in COMMANDS:
        add(commands)
    options, options_rest = parser.parse_known_args(["doctor", *map(str, words)])
    assert isinstance(options, argparse.Namespace) and options.takes_recipe_keys
    options.rest = options_rest
    return int(options.run_command(options))


@pytest.mark.process
def test_the_command_asks_two_hosts_and_lets_them_meet(
    healthy: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    healthy.program("ssh", LOCAL_SSH)
    os.environ.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    healthy.write()
    report = healthy.folder / "report.json"
    words = ["--config", "recipe.yaml", "--hostfile", "hostfile", "--master-addr", "127.0.0.1"]
    words += ["--master-port", str(healthy.setup.master_port), "--json", str(report)]
    started_s = time.monotonic()
    assert doctor(*words, "--optimizer.lr", "0.002") == 0
    took_s = time.monotonic() - started_s
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert re.match(r"all-reduce over 2 hosts \(gloo\): [\d.]+ Gbit/s, [\d.]+ ms", lines[0])
    assert "is the same machine as nodeA" in lines[1]
    assert lines[2:] == ["no error, 1 warning: the run may start"]
    assert "doctor: calling 2 host(s)" in printed.err
    record = json.loads(report.read_text())
    assert record["exit_code"] == 0 and record["bandwidth_gbit"] > 0
    assert [finding["severity"] for finding in record["findings"]] == ["warning"]
    assert record["hosts"]["nodeB"]["recipe"]["optimizer"]["lr"] == 0.002
    assert took_s < 60  # about 7 s where nothing else runs
    assert not list(healthy.folder.glob("**/.doctor-*"))


@pytest.mark.process
def test_the_command_without_a_hostfile_looks_at_this_machine(
    healthy: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy.set("deepspeed.options.nebula", {})
    healthy.write()
    assert doctor("--config", "recipe.yaml", "--processes", "3") == 1
    lines = capsys.readouterr().out.splitlines()
    # a machine of fewer cores than ranks has a warning as well
    assert [line.split(":")[0] for line in lines if line.startswith("error")] == [
        "error   deepspeed.options.nebula",
        "error   3 processes",
    ]
    assert lines[-1].startswith("2 errors, ") and lines[-1].endswith(": mend the errors first")


def test_wrong_words_end_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        doctor("--hostfile", "hostfile")
    assert stop.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_examine_says_what_takes_longer(healthy: Scene) -> None:
    said: list[str] = []
    healthy.write()
    findings = examine(healthy.setup, said.append, healthy._start)
    assert findings == []
    assert said == [
        "calling 2 host(s)",
        "reading shards, disks and devices",
        "an all-reduce over 2 hosts",
        "building the model out of shapes",
    ]


def test_the_options_of_a_launch_are_looked_at(healthy: Scene) -> None:
    healthy.alter(env=["NCCL_DEBUG"])
    [finding] = healthy.findings()
    assert str(finding).startswith("error   --env: NCCL_DEBUG: it is not set here;")


def test_ranks_that_others_start_by_hand_count(healthy: Scene) -> None:
    healthy.alter(hostfile=None, processes=1, world_size=3)
    [finding] = healthy.findings()
    assert str(finding).startswith("error   3 processes: 3 ranks can't share batch.global = 8 ")


def test_one_host_of_several_is_asked_about_all_ranks(
    healthy: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_processes(setup: Setup) -> Examination:
        return examine_all(setup, lambda line: None, healthy._start)

    monkeypatch.setattr(examination, "examine_all", without_processes)
    healthy.write()
    words = ["--config", "recipe.yaml", "--processes", "2"]
    assert doctor(*words, "--world-size", "4") == 0
    capsys.readouterr()
    assert doctor(*words, "--world-size", "6") == 1
    assert "error   6 processes: 6 ranks can't share batch.global = 8 " in capsys.readouterr().out
    first = ["--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port"]
    port = healthy.setup.master_port
    with socket.create_server(("", port)):
        assert doctor(*words, *first, port) == 1
    assert f"error   here: port {port} can't be taken: " in capsys.readouterr().out
    for wrong in (
        ["--master-port", 99999],
        ["--processes", 2, "--world-size", 1],
        ["--hostfile", "h", "--world-size", 4],
        ["--node-rank", 0],
        ["--hostfile", "h", "--node-rank", 0, "--master-addr", "a"],
    ):
        with pytest.raises(SystemExit) as stop:
            doctor("--config", "recipe.yaml", *wrong)
        assert stop.value.code == 2 and str(wrong[-2]) in capsys.readouterr().err


def test_findings_are_lines_with_errors_first() -> None:
    findings = [
        warning("b", "slow", "it\nwaits", "wait"),
        error("a", "broken", "it ends", "mend it"),
    ]
    assert format_findings(findings).splitlines() == [
        "error   a: broken; it ends; mend it",
        "warning b: slow; it waits; wait",
        "1 error, 1 warning: mend the errors first",
    ]
    assert (exit_code(findings), exit_code(findings[:1]), exit_code([])) == (1, 0, 0)
    assert several(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    again = warning("d", "slow", "it\nwaits", "wait")
    assert [finding.where for finding in merged([*findings, again])] == ["b, d", "a"]


# What it claims of DeepSpeed


def test_all_that_deepspeed_removed_is_known() -> None:
    from deepspeed.runtime import config

    assert set(recipe_checks.REMOVED) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(recipe_checks.REMOVED_ZERO) == set(config._REMOVED_ZERO_CONFIG_KEYS)
    assert not set(recipe_checks.ONE_BIT) & set(config.DEEPSPEED_OPTIMIZERS)


@pytest.mark.process
@pytest.mark.parametrize(
    ("line", "code", "starts"),
    [
        ("NCCL_DEBUG=INFO", 0, True),
        ("# a comment", 1, False),
        ("", 1, False),
        ("# NCCL_DEBUG=INFO", 0, False),  # as if all went well
    ],
)
def test_deepspeed_reads_its_file_as_the_doctor_says(
    line: str, code: int, starts: bool, healthy: Scene
) -> None:
    (healthy.folder / ".deepspeed_env").write_text(line + "\n")
    ran = healthy.folder / "ran"
    # The last word is the command for a host; its Python is never called.
    healthy.program(
        "pdsh",
        f"while [ $# -gt 1 ]; do case $1 in export*) break; esac; shift; done\n"
        f'sh -c "$* ; touch {ran}" >/dev/null 2>&1; exit 0',
    )
    words = ["-m", "deepspeed.launcher.runner", "--hostfile", "hostfile", "--no_ssh_check"]
    words += ["--master_addr", "127.0.0.1", "--module", "nothing"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    if code:
        assert "ValueError: not enough values to unpack" in done.stderr
    assert ran.exists() == starts
    findings = check_environment_files([healthy.folder / ".deepspeed_env"], {})
    assert bool(findings) != starts


# Facts


def test_gpus_are_read_as_the_driver_prints_them(healthy: Scene) -> None:
    rows = (
        "0, GPU-8a, NVIDIA H100 80GB HBM3, 81559, 4, 9.0, Default\n"
        "1, GPU-9b, NVIDIA H100 80GB HBM3, 81559, [N/A], 9.0, Exclusive_Process\n"
    )
    first, second = parse_gpus(rows)
    assert (first.index, first.uuid, first.total_mib, first.capability) == (0, "GPU-8a", 81559, 9.0)
    assert (second.used_mib, second.mode) == (0, "Exclusive_Process")
    assert parse_gpus("No devices were found\n") == []
    healthy.program("nvidia-smi", f"cat <<'END'\n{rows}END")
    healthy.write()
    facts = host_facts([str(healthy.folder / "recipe.yaml")], [])
    assert [gpu.name for gpu in facts.gpus] == ["NVIDIA H100 80GB HBM3"] * 2
    assert facts.torch_gpus is not None
    healthy.program("nvidia-smi", "echo 'Failed to initialize NVML: mismatch'; exit 18")
    facts = host_facts([str(healthy.folder / "recipe.yaml")], [])
    assert facts.gpu_error == "Failed to initialize NVML: mismatch" and not facts.gpus


def test_a_recipe_that_can_not_be_read_is_a_fact(tmp_path: Path) -> None:
    facts = host_facts([str(tmp_path / "none.yaml")], [])
    assert facts.recipe_error.startswith(f"recipe {tmp_path}/none.yaml: no such file")
    assert facts.run is None and facts.versions["torch"] and len(facts.sources) == 64


@pytest.mark.process
def test_shards_at_a_url_are_read_like_those_in_a_folder(
    tiny_shards: Path, tmp_path: Path, serve_shards: Callable[..., Any]
) -> None:
    server = serve_shards("http", tiny_shards)
    cache = {"cache": str(tmp_path / "cache"), "cache_gib": 1.0, "patience_s": 0.5}
    near, far = shards(str(tiny_shards / "train"), cache), shards(server.url("train"), cache)
    assert near.samples == 72 and near.shards == 3 and not near.damaged and not near.missing
    assert far == near.model_copy(update={"location": server.url("train")})
    server.kill()
    assert "has not answered for 0.5 s" in shards(server.url("train"), cache).error


@pytest.mark.parametrize(
    ("chunks", "places"),
    [
        ([1], [(0, 0)]),
        ([5], [(0, 0), (0, 4)]),
        ([5, 3], [(0, 0), (1, 2)]),
        ([9] * 100, [(0, 0), (20, 1), (40, 3), (59, 4), (79, 6), (99, 8)]),
    ],
)
def test_a_few_chunks_lie_all_over(chunks: list[int], places: list[tuple[int, int]]) -> None:
    assert some_chunks(chunks) == places


def test_the_first_key_that_differs_is_named() -> None:
    mine: dict[str, Any] = {"a": 1, "b": {"c": 2, "d": 3}}
    assert differing_key(mine, {"a": 1, "b": {"c": 2, "d": 3}}) == ""
    assert differing_key(mine, {"a": 1, "b": {"c": 2, "d": 4}}) == "b.d = 4, not 3"
    assert differing_key(mine, {**mine, "e": 5}) == "e = 5, not None"


def test_modules_count_wherever_they_lie(tmp_path: Path) -> None:
    """Those of sub-packages as well; what is no module does not."""
    module = tmp_path / "launch" / "doctor" / "probe.py"
    module.parent.mkdir(parents=True)
    module.write_text("ONE = 1\n")
    before = sources(tmp_path)
    (module.parent / "notes.txt").write_text("none\n")
    assert sources(tmp_path) == before
    module.write_text("ONE = 2\n")
    assert sources(tmp_path) != before


def test_the_odd_host_is_named_not_the_many() -> None:
    facts = {name: HostFacts(machine=name, versions={"torch": "2.15.0"}) for name in "abcde"}
    facts["a"].versions = {"torch": "2.14.0"}
    [finding] = [f for f in compare_hosts(facts) if "torch" in f.what]
    assert finding.where == "a"
    assert finding.what == "torch is 2.14.0, but 2.15.0 on b, c, d and 1 more"


def test_hosts_that_could_not_read_their_shards_are_not_compared() -> None:
    facts = {name: HostFacts(machine=name) for name in "ab"}
    facts["a"].train = Shards(location="x", fingerprint="1", read="1")
    facts["b"].train = Shards(location="x", error="no such folder; make it")
    assert compare_hosts(facts) == []


@pytest.mark.parametrize(
    ("skew_s", "doubt_s", "severity"),
    [(3, 0, None), (-7, 0, "warning"), (7, 3, None), (400, 1, "error"), (-400, 1, "error")],
)
def test_a_clock_within_doubt_is_right(skew_s: float, doubt_s: float, severity: str | None) -> None:
    found = [finding.severity for finding in check_skew("a", skew_s, doubt_s)]
    assert found == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", True),  # how names begin
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "ib,bond", False),
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
    ],
)
def test_interfaces_are_named_as_libraries_read_them(name: str, value: str, good: bool) -> None:
    assert (not check_interfaces("a", {name: value}, ["lo", "eth0"])) == good


def test_a_ring_carries_most_bytes_twice() -> None:
    meeting = Meeting(size_bytes=10**9, seconds=2)
    assert bandwidth_gbit(meeting, 2) == pytest.approx(4)
    assert bandwidth_gbit(meeting, 1000) == pytest.approx(8, rel=0.01)


def test_ports_are_taken_and_called() -> None:
    port = port_of_nobody()
    assert connect("127.0.0.1", port) == "Connection refused"
    with socket.create_server(("127.0.0.1", port)):
        listener, reason = listen(port)
        assert listener is None
        assert reason.startswith("Address already in use by ") and reason.endswith(str(os.getpid()))
    listener, reason = listen(port)
    assert listener is not None and reason == ""
    assert connect("127.0.0.1", port) == ""
    listener.close()
    assert connect("host.invalid", port) != ""


# Probes


@pytest.mark.process
def test_a_probe_ends_with_its_input_and_leaves_nothing(tmp_path: Path) -> None:
    session = ProbeSession()
    greet(session)
    session.send("leave_token", run=str(tmp_path / "run"), name=".doctor-1")
    token = Path(session.receive(20)["token"])
    assert token.read_text() == ".doctor-1" and token.parent == tmp_path
    session.send("nonsense")
    with pytest.raises(ProbeError, match="KeyError"):
        session.receive(20)
    session.close()
    assert session.process.returncode == 0
    assert not token.exists()


def test_who_does_not_answer_is_given_up(tmp_path: Path) -> None:
    session = ProbeSession(["sh", "-c", "echo hello from the login shell; exec sleep 1000"])
    with pytest.raises(ProbeError, match=r"no answer within 0\.1 s") as silence:
        greet(session, 0.1)
    assert silence.value.code is None
    assert "ssh connects, but" in str(check_start("b", silence.value, "python"))
    session.close()
    assert session.process.returncode == -9


def test_the_last_words_of_a_probe_are_kept() -> None:
    words = "echo first >&2; echo ** WARNING: a banner >&2; echo last >&2; exit 3"
    session = ProbeSession(["sh", "-c", words])
    with pytest.raises(ProbeError, match=r"^last$") as silence:
        greet(session, 20)
    session.send("facts")  # to nobody
    with pytest.raises(ProbeError, match=r"^last$"):
        session.receive(1)
    session.close()
    assert silence.value.code == 3
    assert str(check_start("b", silence.value, "python")).startswith(
        "error   b: no probe could be started there: last;"
    )


def test_another_protocol_is_another_package() -> None:
    words = "echo 'convnext-yolo-probe {\"protocol\": 0}'; exec cat"
    session = ProbeSession(["sh", "-c", words])
    with pytest.raises(ProbeError) as silence:
        greet(session, 20)
    session.close()
    assert "the package there is another version" in str(check_start("b", silence.value, "python"))


def test_ssh_asks_nobody_anything() -> None:
    words = ssh_words("user@b", "/opt/a b/python", 2222, {"PYTHONPATH": "/x y"})
    assert words[:2] == ["ssh", "-T"] and "BatchMode=yes" in words and "ConnectTimeout=5" in words
    assert words[words.index("-p") + 1] == "2222"
    assert words[-3:-1] == ["--", "user@b"]
    assert words[-1] == (
        "env 'PYTHONPATH=/x y' '/opt/a b/python' -m convnext_yolo.launch.doctor.probe"
    )
