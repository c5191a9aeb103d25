"""Set-ups that are broken in one place each, and the line by which the doctor tells of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.launch.doctor.findings import exit_code, format_findings
from convnext_yolo.recipes.checkpoint import FORMAT, MANIFEST, manifest_sha256

from .fake_probes import Answer, Scene, scene

Break = Callable[[Scene], object]


@pytest.fixture
def healthy(tmp_path: Path, tiny_recipe: Callable[..., Path]) -> Iterator[Scene]:
    with scene(tmp_path / "scene", tiny_recipe(tmp_path / "scene")) as found:
        yield found


def hostfile(text: str) -> Break:
    return lambda s: s.hostfile.write_text(text)


def key(name: str, value: object) -> Break:
    return lambda s: s.set(name, value)


def option(name: str, value: object) -> Break:
    return lambda s: s.set(f"deepspeed.options.{name}", value)


def version(package: str, value: str) -> Break:
    return lambda s: s.on("nodeB")(lambda a: a["versions"].update({package: value}))


def fact(**facts: Any) -> Break:
    return lambda s: s.fact("nodeB", **facts)


def ssh_says(text: str, code: int = 255) -> Break:
    """Every host answers so; nobody gets in."""

    def apply(s: Scene) -> None:
        s.real_ssh = True
        s.program("ssh", f"echo '{text}' >&2; exit {code}")

    return apply


def environment_file(text: str) -> Break:
    return lambda s: (s.folder / ".deepspeed_env").write_text(text)


def gpus(count: int = 1, **more: Any) -> list[dict[str, Any]]:
    gpu = {"name": "A100", "total_mib": 81920, "used_mib": 4, "capability": 8.0, "mode": "Default"}
    return [{"index": i, "uuid": f"GPU-{i}", **gpu, **more} for i in range(count)]


def with_gpus(nodes: str = "AB", usable: int = 1, **more: Any) -> Break:
    """GPUs on both hosts; on the second one as it says."""

    def apply(s: Scene) -> None:
        s.fact("nodeA", gpus=gpus(), torch_gpus=1)
        s.fact("nodeB", gpus=gpus(**more) if "B" in nodes else [], torch_gpus=usable)

    return apply


def own_shards(change: Callable[[Path], object]) -> Break:
    """Changes a copy of the training shards."""

    def apply(s: Scene) -> None:
        copy = s.folder / "copy"
        shutil.copytree(s.recipe["data"]["train"], copy)
        s.set("data.train", str(copy))
        change(copy)

    return apply


def flip_a_byte(folder: Path) -> None:
    shard = sorted(folder.glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1  # in the first sample's picture
    shard.write_bytes(content)


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])


def other_classes(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("Platelets", "Thrombocytes"))


def on_nodeb(**answers: Any) -> Break:
    """Other answers about the shards of the second host."""
    return lambda s: s.on("nodeB")(lambda a: a["train"].update(answers))


def busy_port(s: Scene) -> None:
    s.held.append(socket.create_server(("", s.setup.master_port)))


def answer(host: str, question: str, **values: Any) -> Break:
    return lambda s: s.on(host, question)(lambda a: a.update(values))


def nobody_connects(s: Scene) -> None:
    for host in ("nodeA", "nodeB"):
        s.on(host, "connect")(lambda a: a.update(error="No route to host"))


def late_clock(a: Answer) -> None:
    a["time_s"] += 90


def old_checkpoints(s: Scene) -> None:
    checkpoint(s, "run/checkpoints/step-00000004")
    s.alter(resume="never")


def checkpoint(s: Scene, name: str, **parts: int) -> Path:
    """A checkpoint by its manifest alone, and the bytes that its parts should have."""
    folder = s.folder / name
    folder.mkdir(parents=True)
    listed = {f"{part}.safetensors": {"sha256": "0", "bytes": n} for part, n in parts.items()}
    manifest: dict[str, Any] = {"format": FORMAT, "step": 4, "state": {}, "parts": listed}
    manifest["sha256"] = manifest_sha256(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def resume_from_a_stump(s: Scene) -> None:
    folder = checkpoint(s, "old/step-00000004", weights=9)
    (folder / "weights.safetensors").write_bytes(b"short")
    s.alter(resume=str(folder))


def run_in_a_file(s: Scene) -> None:
    s.set("run", "/proc/self/run")


def run_below_a_file(s: Scene) -> None:
    (s.folder / "a_file").write_text("in the way")
    s.set("run", str(s.folder / "a_file/runs/mine"))


def two_environment_files(s: Scene) -> None:
    (s.folder / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    (s.folder / "work").mkdir()
    (s.folder / "work/.deepspeed_env").write_text("NCCL_DEBUG=WARN\n")
    os.chdir(s.folder / "work")


def unset_file(s: Scene) -> None:
    os.environ["DS_ENV_FILE"] = "cluster_env"


def interface(s: Scene) -> None:
    os.environ["NCCL_SOCKET_IFNAME"] = "ib7"


def online(s: Scene) -> None:
    s.set("tracking.wandb", "online")
    os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"  # nobody listens there


def only(*programs: str) -> Break:
    def apply(s: Scene) -> None:
        os.environ["PATH"] = str(s.folder / "bin")
        for path in (s.folder / "bin").iterdir():
            if path.name not in programs:
                path.unlink()

    return apply


# name: (what is broken, severity, where the line says, what it says)
TABLE: dict[str, tuple[Break, str, str]] = {
    # the hostfile
    "no hostfile": (lambda s: s.hostfile.unlink(), "error", r"hostfile: .*no such file"),
    "a bad line": (hostfile("nodeA 2\n"), "error", r"line 1: 'nodeA 2' is not `host slots=N`"),
    "a host twice": (
        hostfile("nodeA slots=1\nnodeA slots=1\n"),
        "error",
        r"line 2: nodeA is there already",
    ),
    "an empty hostfile": (hostfile("# none\n"), "error", r"has no host"),
    "localhost among others": (
        hostfile("localhost slots=1\nnodeB slots=1\n"),
        "error",
        r"localhost is among 2 hosts",
    ),
    "one machine twice": (fact(machine="nodeA"), "warning", r"nodeB: is the same machine as nodeA"),
    # ssh
    "no pdsh": (only("ssh"), "error", r"here: pdsh is not installed"),
    "no key": (
        ssh_says("root@nodeB: Permission denied (publickey)."),
        "error",
        r"nodeB: ssh is refused .*ssh-copy-id nodeB",
    ),
    "no such name": (
        ssh_says("ssh: Could not resolve hostname nodeB: Name or service not known"),
        "error",
        r"nodeB: its name is not known here",
    ),
    "a strange key": (
        ssh_says("Host key verification failed."),
        "error",
        r"nodeB: ssh does not trust its host key",
    ),
    "no sshd": (
        ssh_says("ssh: connect to host nodeB port 22: Connection refused"),
        "error",
        r"nodeB: nothing listens for ssh",
    ),
    "a host that is down": (
        ssh_says("ssh: connect to host nodeB port 22: Connection timed out"),
        "error",
        r"nodeB: ssh can.t reach it",
    ),
    "no Python there": (
        ssh_says("bash: line 1: /opt/venv/bin/python: No such file or directory", 127),
        "error",
        r"nodeB: .* does not run there",
    ),
    "no package there": (
        ssh_says("ModuleNotFoundError: No module named convnext_yolo", 1),
        "error",
        r"nodeB: the package is not installed there",
    ),
    "a probe that dies": (
        answer("nodeB", "facts", dies="Killed"),
        "error",
        r"nodeB: no answer while reading shards.*Killed",
    ),
    "no such folder there": (
        answer("nodeB", "settle", error="No such file or directory"),
        "error",
        r"nodeB: .* is not there \(No such file",
    ),
    # software
    "another Python": (
        version("python", "3.9.1"),
        "error",
        r"nodeB: python is 3\.9\.1, but 3\.\S+ on nodeA",
    ),
    "another torch": (version("torch", "2.14.0"), "error", r"nodeB: torch is 2\.14\.0, but"),
    "another deepspeed": (version("deepspeed", "0.18.1"), "error", r"nodeB: deepspeed is 0\.18\.1"),
    "another NCCL": (version("nccl", "2.20.5"), "error", r"nodeB: nccl is 2\.20\.5, but"),
    "another timm": (version("timm", "1.0.9"), "error", r"nodeB: timm is 1\.0\.9, but"),
    "another numpy": (version("numpy", "2.1.0"), "warning", r"nodeB: numpy is 2\.1\.0, but"),
    "another package": (
        version("convnext-yolo", "0.0.9"),
        "error",
        r"nodeB: convnext-yolo is 0\.0\.9, but",
    ),
    "another checkout": (
        fact(sources="f00"),
        "error",
        r"nodeB: convnext-yolo has other modules there than on nodeA",
    ),
    "no deepspeed": (
        lambda s: s.on("nodeB")(lambda a: a["versions"].pop("deepspeed")),
        "error",
        r"nodeB: deepspeed is not installed",
    ),
    # the recipe
    "another recipe": (
        lambda s: s.on("nodeB")(lambda a: a["recipe"]["optimizer"].update(lr=0.5)),
        "error",
        r"nodeB: its recipe is another: optimizer\.lr = 0\.5, not 0\.001",
    ),
    "no recipe there": (
        fact(recipe_error="recipe r.yaml: no such file", recipe={}),
        "error",
        r"nodeB: the recipe can.t be read there",
    ),
    "an unknown key": (key("optimizer.lrr", 1), "error", r"recipe: .*unknown key optimizer\.lrr"),
    "an unknown parameter": (
        key("optimizer.freeze", ["spine."]),
        "error",
        r"recipe: optimizer\.freeze: spine\.",
    ),
    "no such weights": (
        key("model.weights", "/nowhere.safetensors"),
        "error",
        r"nodeB: /nowhere\.safetensors is not there",
    ),
    "fp16 on CPUs": (key("deepspeed.precision", "fp16"), "error", r"nodeB: .*fp16, but it has no"),
    "compile without a compiler": (
        lambda s: (s.set("deepspeed.compile", True), s.fact("nodeB", has_compiler=False)),
        "error",
        r"nodeB: deepspeed\.compile is on, but there is no C compiler",
    ),
    # DeepSpeed's keys
    "nebula": (option("nebula", {"enabled": True}), "error", r"options\.nebula: DeepSpeed has rem"),
    "elasticity": (
        option("elasticity", {}),
        "error",
        r"options\.elasticity: DeepSpeed has",
    ),
    "amp": (option("amp", {"enabled": True}), "error", r"options\.amp: DeepSpeed has removed it"),
    "curriculum": (option("curriculum_learning", {}), "error", r"curriculum_learning: DeepSpeed"),
    "MiCS": (
        option("zero_optimization.mics_shard_size", 8),
        "error",
        r"mics_shard_size: DeepSp",
    ),
    "1-bit Adam": (
        option("optimizer", {"type": "OneBitAdam"}),
        "error",
        r"optimizer\.type = OneBitAdam: DeepSpeed has removed it",
    ),
    "auto": (option("zero_optimization.reduce_bucket_size", "auto"), "error", r"it is 'auto'"),
    "said twice": (
        option("bf16", {"enabled": True}),
        "error",
        r"deepspeed\.options\.bf16: the recipe says that in deepspeed\.precision",
    ),
    "a contradiction": (
        option("train_batch_size", 999),
        "error",
        r"train_batch_size = 999 contradicts 8",
    ),
    "a value that is none": (
        option("zero_optimization.reduce_bucket_size", "many"),
        "error",
        r"DeepSpeed refuses them: .*reduce_bucket_size",
    ),
    "a misspelt key": (
        option("comms_loger", {"enabled": True}),
        "warning",
        r"deepspeed\.options\.comms_loger: DeepSpeed does not know it",
    ),
    # arithmetic
    "a micro-batch too large": (
        lambda s: (
            s.set("batch", {"global": 8, "micro": 4}),
            hostfile("nodeA slots=2\nnodeB slots=2\n")(s),
        ),
        "error",
        r"4 ranks can.t share .*start 2 ranks \(all that divide: 1, 2\), or set batch\.global to "
        r"16 or batch\.micro to 2$",
    ),
    "a batch that does not divide": (
        hostfile("nodeA slots=2\nnodeB slots=1\n"),
        "error",
        r"3 ranks can.t share batch\.global = 8 .*start 2 ranks \(all that divide: 1, 2, 4\), or "
        r"set batch\.global to 6 or 12",
    ),
    "more ranks than samples": (
        lambda s: (s.set("batch", {"global": 128, "micro": 1}), hostfile("nodeA slots=128\n")(s)),
        "error",
        r"data\.train = .*128 ranks, but only \d\d samples",
    ),
    "more ranks than shards": (
        hostfile("nodeA slots=2\nnodeB slots=2\n"),
        "warning",
        r"4 ranks, but only 3 shard\(s\)",
    ),
    "a batch above the samples": (
        key("batch", {"global": 256, "micro": 2}),
        "error",
        r"batch\.global = 256, but only \d\d samples",
    ),
    # GPUs
    "more slots than GPUs": (
        lambda s: (
            hostfile("nodeA slots=1\nnodeB slots=3\n")(s),
            with_gpus(usable=2, count=2)(s),
        ),
        "error",
        r"nodeB: 3 slots, but 2 GPU\(s\)",
    ),
    "a GPU in use": (
        with_gpus(used_mib=70000),
        "error",
        r"nodeB: GPU 0 is in use: 70000 of 81920 MiB",
    ),
    "a prohibited GPU": (with_gpus(mode="Prohibited"), "error", r"nodeB: GPU 0 is in compute mode"),
    "torch without GPUs": (with_gpus(usable=0), "error", r"nodeB: .* but torch \S+ sees none"),
    "a dead driver": (
        fact(gpu_error="Driver/library version mismatch"),
        "error",
        r"nodeB: the GPU driver does not answer: Driver/library version mismatch",
    ),
    "GPUs on one host": (with_gpus("A"), "error", r"nodeB: has no GPU, but nodeA has"),
    "an old GPU": (
        lambda s: (s.set("deepspeed.precision", "bf16"), with_gpus(capability=7.0, name="V100")(s)),
        "warning",
        r"nodeB: deepspeed\.precision = bf16, but V100",
    ),
    "other GPUs": (with_gpus(name="V100"), "warning", r"nodeB: its GPUs are V100, those of nodeA"),
    "a CPU accelerator": (
        lambda s: (with_gpus()(s), s.fact("nodeB", gpus=gpus(), torch_gpus=1, accelerator="cpu")),
        "error",
        r"nodeB: DS_ACCELERATOR=cpu, but it has 1 GPU",
    ),
    "an accelerator that is none": (
        fact(accelerator="cuda"),
        "error",
        r"nodeB: DS_ACCELERATOR=cuda, but it has no GPU",
    ),
    # data
    "no shards": (
        key("data.train", "/nowhere"),
        "error",
        r"nodeB: data\.train = /nowhere: no such shard folder",
    ),
    "a shard is missing": (
        own_shards(lambda folder: sorted(folder.glob("*.tar"))[1].unlink()),
        "error",
        r"nodeB: data\.train = .*the shard is missing \(1 such shard",
    ),
    "a shard is cut short": (own_shards(truncate), "error", r"nodeB: .*bytes, the manifest says"),
    "a damaged sample": (own_shards(flip_a_byte), "error", r"nodeB: .*other bytes than its digest"),
    "a damaged manifest": (
        own_shards(lambda folder: (folder / "manifest.json").write_text("{")),
        "error",
        r"nodeB: data\.train = .*the manifest is damaged",
    ),
    "other classes": (
        own_shards(other_classes),
        "error",
        r"its 3 classes are not the 3 of data\.train, as 3 Thrombocytes",
    ),
    "another data set": (
        on_nodeb(fingerprint="0" * 64),
        "error",
        r"nodeB: data\.train = .* is another data set than on nodeA",
    ),
    "other samples": (
        on_nodeb(read="0" * 64),
        "error",
        r"nodeB: data\.train = .* has other samples than on nodeA",
    ),
    # room
    "a full disk": (
        lambda s: s.on("nodeB")(lambda a: a["run"].update(free_bytes=2**20)),
        "error",
        r"nodeB: run: .* has 1 MiB free, its checkpoints will take \d+ MiB \(\d of",
    ),
    "a full disk under the cache": (
        fact(
            cache={"place": "/cache", "free_bytes": 2**30, "used_bytes": 2**30},
            train={"location": "s3://a/train", "bytes": 4 * 2**30},
            val={"location": "s3://a/val", "bytes": 2**30},
        ),
        "warning",
        r"nodeB: data\.cache: /cache has 1\.0 GiB free, 4\.0 GiB are still to come there",
    ),
    "a bound of the cache": (
        lambda s: (
            s.set("data.cache_gib", 3),
            fact(
                cache={"place": "/cache", "free_bytes": 2**30},
                train={"location": "s3://a/train", "bytes": 4 * 2**30},
            )(s),
        ),
        "warning",
        r"nodeB: data\.cache: /cache has 1\.0 GiB free, 3\.0 GiB are still to come there",
    ),
    "a cache that can't be": (
        fact(cache={"place": "/cache", "error": "Permission denied"}),
        "error",
        r"nodeB: data\.cache: /cache can.t be written \(Permission denied\)",
    ),
    "a small /dev/shm": (
        lambda s: (s.set("data.workers", 4), s.fact("nodeB", shm_free_bytes=1000)),
        "error",
        r"nodeB: /dev/shm has 0 MiB free",
    ),
    "a run folder of one host": (
        lambda s: s.on("nodeB")(lambda a: a["run"].update(has_token=False)),
        "error",
        r"nodeB: run: .* does not show what the first host writes",
    ),
    "a run folder that can't be": (run_in_a_file, "error", r"nodeB: run: .* can.t be written"),
    "a run folder below a file": (
        run_below_a_file,
        "error",
        r"nodeA, nodeB: run: \S*a_file can.t be written \(Not a directory\)",
    ),
    "a fresh start on an old run": (
        old_checkpoints,
        "error",
        r"--resume never, .*it has 1 checkpoint\(s\) already",
    ),
    "no such checkpoint": (
        lambda s: s.alter(resume="/nowhere"),
        "error",
        r"nodeB: --resume /nowhere: no such folder; .*give a folder RUN/checkpoints/step-",
    ),
    "no checkpoint at all": (
        lambda s: s.alter(resume=str(s.folder)),
        "error",
        r"nodeB: --resume \S+: no readable manifest\.json",
    ),
    "a checkpoint that was cut short": (
        resume_from_a_stump,
        "error",
        r"nodeB: --resume \S+: weights\.safetensors has 5 bytes, the manifest says 9",
    ),
    "no checkpoint that can be used": (
        lambda s: checkpoint(s, "run/checkpoints/step-00000004", weights=9),
        "error",
        r"nodeB: --resume auto: .*none of the checkpoints .*weights\.safetensors is missing",
    ),
    # the network
    "a port in use": (
        busy_port,
        "error",
        r"nodeA: port \d+ can.t be taken: Address already",
    ),
    "a blocked port": (
        answer("nodeB", "connect", error="no answer within 4 s"),
        "error",
        r"nodeB: can.t reach 127\.0\.0\.1, port \d+ \(no answer",
    ),
    "a wrong address": (
        nobody_connects,
        "error",
        r"nodeA: no host reaches it as 127\.0\.0\.1, .*--master-addr",
    ),
    "a port of the kernel's": (
        answer("nodeA", "facts", port_range=(1024, 65535)),
        "warning",
        r"nodeA: port \d+ is among those that the kernel gives away",
    ),
    "a clock that is off": (
        lambda s: s.on("nodeB", "time")(late_clock),
        "warning",
        r"nodeB: its clock is 90 s ahead of this machine.s",
    ),
    "no such interface": (interface, "error", r"nodeB: NCCL_SOCKET_IFNAME=ib7, but its interfaces"),
    "a name that means 127.0.1.1": (
        fact(address="127.0.1.1"),
        "error",
        r"nodeB: its own name means 127\.0\.1\.1 there",
    ),
    "an all-reduce that fails": (
        answer("nodeB", "meet", error="Connection closed by peer"),
        "error",
        r"nodeB: the all-reduce failed \(gloo\): Connection closed by peer",
    ),
    "an all-reduce that lies": (
        answer("nodeB", "meet", wrong=True),
        "error",
        r"nodeB: the all-reduce gave a wrong sum",
    ),
    # .deepspeed_env
    "a comment": (
        environment_file("# for the cluster\n"),
        "warning",
        r"\.deepspeed_env, line 1: a comment; .*ValueError",
    ),
    "an empty line": (
        environment_file("NCCL_DEBUG=INFO\n\n"),
        "warning",
        r"\.deepspeed_env, line 2: an empty line; .*ValueError",
    ),
    "a comment with =": (
        environment_file("# NCCL_DEBUG=INFO\n"),
        "warning",
        r"line 1: a comment with an equals sign; .*no rank starts, exit code 0",
    ),
    "export": (
        environment_file("export NCCL_DEBUG=INFO\n"),
        "error",
        r"line 1: export NCCL_DEBUG begins with export; .*write NCCL_DEBUG=INFO",
    ),
    "quotes": (
        environment_file('NCCL_DEBUG_FILE="/tmp/$HOST"\n'),
        "error",
        r"line 1: NCCL_DEBUG_FILE = .* has quotes",
    ),
    "no text": (
        lambda s: (s.folder / ".deepspeed_env").write_bytes(b"A=\xff\n"),
        "error",
        r"\.deepspeed_env: can't be read \(.*; mend it",
    ),
    "no name": (environment_file("2FAST=1\n"), "error", r"line 1: '2FAST' is no variable.s name"),
    "the launcher's own": (
        environment_file("CUDA_VISIBLE_DEVICES=0\n"),
        "warning",
        r"line 1: CUDA_VISIBLE_DEVICES is set; the launcher",
    ),
    "what is not handed on": (
        environment_file("MY_TOKEN=1\n"),
        "warning",
        r"line 1: MY_TOKEN is set; .*--env MY_TOKEN",
    ),
    "two files": (
        two_environment_files,
        "warning",
        r"work/\.deepspeed_env, line 1: NCCL_DEBUG is set in .* as well, to 'INFO'",
    ),
    "no such file": (unset_file, "warning", r"DS_ENV_FILE=cluster_env: there is no such file"),
    # trackers
    "no key for W&B": (online, "warning", r"nodeA: tracking\.wandb = online: no WANDB_API_KEY"),
    "no way to W&B": (online, "warning", r"nodeA: .*127\.0\.0\.1:9 can.t be reached"),
}


def test_a_healthy_set_up_has_no_findings(healthy: Scene) -> None:
    found = healthy.examine()
    assert found.findings == []
    assert format_findings([], 2) == "nothing found on 2 hosts: the run may start"
    assert found.notes[0].startswith("all-reduce over 2 hosts (gloo): ")
    assert found.needs is not None and found.needs.checkpoint_bytes > 4 * found.needs.parameters * 4
    # nothing of it is left
    assert not list(healthy.folder.glob("**/.doctor-*"))
    assert not Path(healthy.recipe["run"]).exists()


def test_what_train_would_resume_is_no_finding(healthy: Scene) -> None:
    whole = checkpoint(healthy, "run/checkpoints/step-00000004", weights=4)
    (whole / "weights.safetensors").write_bytes(b"four")
    checkpoint(healthy, "run/checkpoints/step-00000008", weights=4)  # it takes the one before
    assert healthy.findings() == []
    healthy.alter(resume=str(whole))
    assert healthy.findings() == []


def test_what_was_never_published_is_no_checkpoint(healthy: Scene) -> None:
    (healthy.folder / "run/checkpoints/step-00000004.partial").mkdir(parents=True)
    healthy.alter(resume="never")
    assert healthy.findings() == []


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name: str, healthy: Scene) -> None:
    broken, severity, line = TABLE[name]
    broken(healthy)
    findings = healthy.findings()
    printed = format_findings(findings, 2).splitlines()
    lines = [text for text in printed if re.search(line, text)]
    assert lines, "\n".join(printed)
    assert all(text.startswith(severity) for text in lines), lines
    if severity == "error":
        assert exit_code(findings) == 1
    elif not any(finding.severity == "error" for finding in findings):
        assert exit_code(findings) == 0
    for finding in findings:
        assert finding.where and finding.what and finding.why and finding.mend
        assert "\n" not in str(finding)
