"""What the launchers would run, and that their own parsers read it as meant."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from convnext_yolo.launch import elastic, launchers, slurm
from convnext_yolo.launch.cli import main
from convnext_yolo.launch.command import Command
from convnext_yolo.launch.hostfile import read_hostfile
from convnext_yolo.launch.job import LaunchError, given_environment, rank_environment
from convnext_yolo.launch.supervision import supervise
from convnext_yolo.launch.supervision.processes import write_files
from convnext_yolo.recipes.config import Recipe, RecipeError
from convnext_yolo.recipes.engine import batch_plan, deepspeed_config
from convnext_yolo.recipes.load import load_recipe

BIN = Path(sys.executable).parent
OPTIONS = ["--optimizer.lr", "0.0005", "--deepspeed.stage", "3"]


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\nhost-a slots=2\n\nuser@host-b slots=2\n")
    return path


def test_local_prints_the_exact_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "quickstart", "--processes", "2", "--run", "runs/a b", "--dry-run"]
    assert main(["launch", "local", *words]) == 0
    command = shlex.split(capsys.readouterr().out)
    start = next(i for i, word in enumerate(command) if word.endswith("deepspeed"))
    assert command[start + 1 : start + 3] == ["--num_gpus", "2"]
    module = command.index("--module")
    assert command[module - 1] == "--no_local_rank"
    assert command[module + 1 : module + 4] == ["convnext_yolo.launch", "train", "--config"]
    assert Path(command[module + 4]).is_file()
    assert command[module + 5 :] == ["--resume", "auto", "--run", "runs/a b"]


def test_the_doctor_is_asked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "quickstart", "--run", str(tmp_path / "r")]
    assert main(["launch", "local", *words, "--data.train", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error and "the doctor found errors" in error
    assert not (tmp_path / "r").exists()


def test_local_takes_the_gpus_that_it_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "gpus_here", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    words = launchers.local(["quickstart"], "auto", [], None).words
    assert words[words.index("--include") + 1] == "localhost:5,6"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0a1b")
    with pytest.raises(LaunchError, match="CUDA_VISIBLE_DEVICES=MIG-0a1b"):
        launchers.local(["quickstart"], "auto", [], None)


def test_processes_that_do_not_share_the_batch() -> None:
    with pytest.raises(RecipeError, match=r"--processes 3: .*makes 2 micro-batches of 8.*; 2 can"):
        launchers.local(["quickstart"], "auto", [], 3)


# ---- one recipe, every launcher


def of_deepspeed(command: Command) -> tuple[int, Sequence[str]]:
    """How many ranks DeepSpeed's own parsers find in a command, and what each runs."""
    from deepspeed.launcher import runner

    parsed = runner.parse_args(command.words[1:])
    assert parsed.module and parsed.no_local_rank
    pool = runner.fetch_hostfile(parsed.hostfile)
    world = sum(pool.values()) if pool else parsed.num_gpus
    return world, [parsed.user_script, *parsed.user_args]


def of_torchrun(command: Command) -> tuple[int, Sequence[str]]:
    from torch.distributed import run

    parsed = run.get_args_parser().parse_args(command.words[1:])
    assert parsed.module
    world = int(parsed.nnodes) * int(parsed.nproc_per_node)
    return world, [parsed.training_script, *parsed.training_script_args]


def of_accelerate(command: Command) -> tuple[int, Sequence[str]]:
    from accelerate.commands import launch

    write_files(command)
    parsed = launch.launch_command_parser().parse_args(command.words[2:])
    parsed, _, _ = launch._validate_launch_command(parsed)
    assert parsed.multi_gpu and parsed.module and not parsed.use_deepspeed
    assert parsed.mixed_precision == "no" and parsed.rdzv_backend == "static"
    return parsed.num_processes, [parsed.training_script, *parsed.training_script_args]


def of_slurm(command: Command) -> tuple[int, Sequence[str]]:
    write_files(command)
    script = Path(command.words[-1]).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.M))
    [recipe] = re.findall(r"^recipe=\((.*)\)$", script, re.M)
    world = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    return world, ["convnext_yolo.launch", "train", *shlex.split(recipe)]


def resolved(train: Sequence[str]) -> Recipe:
    """The recipe that a rank with these words trains."""
    assert list(train[:2]) == ["convnext_yolo.launch", "train"]
    words, configs, options = list(train[2:]), [], []
    while words:
        key, value = words.pop(0), words.pop(0)
        if key == "--config":
            configs.append(Path(value))
        elif key != "--resume":
            options += [key, value]
    return load_recipe(configs, options)


def test_one_recipe_under_every_launcher(
    tmp_path: Path, hostfile: Path, tiny_recipe: Callable[..., Path]
) -> None:
    """World, batches, accumulation, learning rate, ZeRO stage: the same, read by their parsers."""
    job = ([str(tiny_recipe(tmp_path))], "auto", OPTIONS)
    hosts = elastic.Hosts(2, 1, 2, "127.0.0.1:29500")
    asked = slurm.Allocation(nodes=2, processes=2)
    found = {
        "local": of_deepspeed(launchers.local(*job, 4)),
        "deepspeed": of_deepspeed(launchers.deepspeed(*job, hostfile)),
        "no-ssh": of_deepspeed(launchers.deepspeed(*job, hostfile, node_rank=1)),
        "torchrun": of_torchrun(elastic.torchrun(*job, hosts, "id")),
        "accelerate": of_accelerate(elastic.accelerate(*job, hosts)),
        "slurm": of_slurm(slurm.slurm(*job, asked)),
    }
    for name, (world_size, train) in found.items():
        recipe = resolved(train)
        world: Any = type("World", (), {"rank": 0, "size": world_size})
        plan = batch_plan(recipe, world)
        config = deepspeed_config(recipe, plan)
        assert (world_size, plan.global_batch, plan.micro_batch, plan.accumulation) == (
            *(4, 8, 2),
            1,
        ), name
        assert config["train_batch_size"] == 8
        assert config["zero_optimization"]["stage"] == 3
        assert recipe.optimizer.lr == 0.0005
        assert recipe.model_dump() == resolved(found["local"][1]).model_dump(), name


@pytest.mark.parametrize(
    "words",
    [
        ["deepspeed", "--hostfile", "HOSTFILE"],
        ["slurm", "--nodes", "3"],
        ["torchrun", "--processes-per-node", "3"],
        ["accelerate", "--processes-per-node", "3"],
    ],
)
def test_a_batch_that_can_not_be_shared_is_refused_first(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=1\n")
    words = [str(hostfile) if word == "HOSTFILE" else word for word in words]
    assert main(["launch", *words, "--config", "quickstart", "--run", str(tmp_path / "r")]) == 2
    assert "which 3 processes can't share equally; 2 can" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_dry_run_is_a_script_and_writes_nothing(
    tmp_path: Path, hostfile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed is what would be used, to the byte, and a shell makes it so."""
    run = tmp_path / "it's a run"
    words = ["--config", "quickstart", "--run", str(run), "--dry-run"]
    assert main(["launch", "slurm", *words, "--nodes", "2"]) == 0
    script = capsys.readouterr().out
    assert not run.exists()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\ncp "$1" "$0.submitted"\n')
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-eu"], input=script, text=True, check=True, env={"PATH": path})
    printed = {p.name: p.read_bytes() for p in (run / "launch").iterdir()}
    assert set(printed) == {"recipe.yaml", "job.sbatch"}
    assert Path(f"{sbatch}.submitted").read_bytes() == printed["job.sbatch"]
    command = slurm.slurm(["quickstart"], "auto", ["--run", str(run)], slurm.Allocation(nodes=2))
    write_files(command)
    assert {p.name: p.read_bytes() for p in (run / "launch").iterdir()} == printed


@pytest.mark.parametrize(
    ("words", "ranks", "hosts", "most"),
    [
        (["local", "--processes", "4"], 4, 1, 4),
        (["deepspeed", "--hostfile", "HOSTFILE"], 4, 2, 2),
        (["deepspeed", "--hostfile", "HOSTFILE", "--no-ssh"], 4, 2, 2),
        (["slurm", "--nodes", "4", "--processes-per-node", "2"], 8, 4, 2),
        (["torchrun", "--nodes", "2", "--processes-per-node", "4"], 8, 2, 4),
        (["accelerate", "--nodes", "2", "--processes-per-node", "4"], 8, 2, 4),
    ],
)
def test_a_plan_of_this_very_launch(
    words: list[str],
    ranks: int,
    hosts: int,
    most: int,
    tmp_path: Path,
    hostfile: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing starts; the command that it names prints the same of these ranks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = [str(hostfile) if word == "HOSTFILE" else word for word in words]
    keys = ["--batch.micro", "2", "--run", str(tmp_path / "a run")]
    figures = ["--gpu-tflops", "989", "--network-gbit", "400"]
    words = [*words, "--config", "quickstart", *keys, *figures, "--plan"]
    assert main(["launch", *words]) == 0
    printed = capsys.readouterr().out
    each = f"at most {most} on one"
    assert printed.startswith(f"this launch: {ranks} rank(s) on {hosts} host(s), {each}\n")
    named = shlex.split(printed.rpartition(": convnext-yolo ")[2])
    assert named == [
        *("plan", "--config", "quickstart", *keys),
        *("--gpus", str(ranks), "--gpus-per-node", str(most), *figures),
    ]
    assert main(named) == 0
    lines = capsys.readouterr().out.splitlines()
    [row] = [line for line in lines if re.match(rf" +{ranks} +(\d|-)", line) and "*" not in line]
    assert row in printed.splitlines() and re.search(r"^ +1024 ", printed, re.M)
    assert lines[-1] in printed and not (tmp_path / "a run").exists()


def test_a_plan_of_ranks_that_do_not_share_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--batch.global", "6", "--batch.micro", "1"]
    words = ["torchrun", "--processes-per-node", "4", "--config", "quickstart", *keys]
    assert main(["launch", *words, "--plan"]) == 2
    assert "this launch: batch.global = 6 makes 6 micro-batches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:10", 7210),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-2:30:05", 95405),
        ("UNLIMITED", 0),
    ],
)
def test_time_limits_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert slurm._seconds(time) == seconds


def test_what_has_spaces_is_quoted_for_sbatch(tmp_path: Path) -> None:
    more = ("--comment=a b", '--mail-user="c d"', "--exclusive")
    asked = slurm.Allocation(partition="gpu nodes", more=more)
    script = slurm.slurm(["quickstart"], "auto", ["--run", str(tmp_path)], asked).files[1].text
    for line in ('--comment="a b"', '--mail-user="c d"', "--exclusive", '--partition="gpu nodes"'):
        assert f"#SBATCH {line}\n" in script


def test_the_address_of_a_lost_first_host_is_dropped(tmp_path: Path, hostfile: Path) -> None:
    """A restart has another first host, and the ranks meet there."""
    keys = ["--run", str(tmp_path), "--batch.global", "8", "--batch.micro", "1"]
    first, second = read_hostfile(hostfile)
    for lost, address in (([], "10.1.0.1"), ([second], "10.1.0.1"), ([first], "host-b")):
        command = launchers.deepspeed(
            ["quickstart"], "auto", keys, hostfile, master_address="10.1.0.1", lost=lost
        )
        assert command.words[command.words.index("--master_addr") + 1] == address


def test_a_restart_by_hand_leaves_out_nobody(tmp_path: Path, hostfile: Path) -> None:
    """This host alone can't: the others would not know."""
    keys = ["--run", str(tmp_path), "--batch.global", "8", "--batch.micro", "1"]
    whole = launchers.deepspeed(["quickstart"], "auto", keys, hostfile, node_rank=0)
    again = launchers.deepspeed(
        ["quickstart"], "auto", keys, hostfile, node_rank=0, lost={"host-a"}
    )
    assert again == whole


def test_no_ssh_of_a_job_serves_other_sessions(
    tmp_path: Path, hostfile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i key")
    keys = ["--run", str(tmp_path), "--batch.global", "8", "--batch.micro", "1"]
    command = launchers.deepspeed(["quickstart"], "auto", keys, hostfile)
    assert command.environment["PDSH_SSH_ARGS_APPEND"] == "-oControlMaster=no -i key"


def test_a_restart_goes_on_from_the_named_checkpoint_until_there_is_a_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` would take the branch that was left; what a start sets aside is nothing newer."""
    checkpoints = tmp_path / "checkpoints"

    def publish(name: str, time_s: int) -> None:
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "manifest.json").touch()
        os.utime(checkpoints / name / "manifest.json", (time_s, time_s))

    publish("step-00000100", 1)
    publish("step-00001000", 2)
    given = str(tmp_path / "set-aside-step-00000500")
    resumed: list[str] = []

    def run(render: Callable[..., Command], *_: object) -> None:
        def start() -> None:
            command = render(frozenset())
            resumed.append(command.words[command.words.index("--resume") + 1])

        start()
        start()
        (checkpoints / "step-00001000").rename(checkpoints / "set-aside-step-00001000")
        start()
        publish("step-00001000", 3)
        start()

    monkeypatch.setattr(supervise, "run", run)
    keys = ["--config", "quickstart", "--run", str(tmp_path), "--resume", given, "--no-doctor"]
    assert main(["launch", "local", *keys]) == 0
    assert resumed == [given, given, given, "auto"]


def test_each_rank_has_its_host_where_hosts_are_started_by_hand(
    tmp_path: Path, hostfile: Path
) -> None:
    keys = ["--run", str(tmp_path), "--batch.global", "8", "--batch.micro", "1"]
    ranks = launchers.deepspeed(["quickstart"], "auto", keys, hostfile, node_rank=1).ranks
    assert ranks and ranks.hosts == {2: "user@host-b", 3: "user@host-b"}


# ---- deepspeed


def test_words_survive_deepspeed_pdsh_and_the_other_shell(tmp_path: Path, hostfile: Path) -> None:
    """DeepSpeed's own runner makes the pdsh command; a shell takes it apart again."""
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import PDSHRunner

    hard = [
        "a b",
        "{a:1,b:2}",
        "$HOME",
        "x;y|z&",
        'say "hi" $USER `id` \\',
        "it's",
        "100%n%h%%",
        "a*",
        "~",
    ]
    options = [word for value in hard for word in ("--run", value)]
    options += ["--run", str(tmp_path / "run"), "--batch.global", "32"]
    command = launchers.deepspeed(["quickstart"], "auto", options, hostfile)
    args = runner.parse_args(command.words[1:])
    pdsh, _, _ = PDSHRunner(args, "WORLD").get_cmd({}, {"host-a": [0], "host-b": [0]})
    remote = " ".join(pdsh[pdsh.index("-w") + 2 :])
    remote = re.sub("%[%n]", lambda match: {"%%": "%", "%n": "1"}[match[0]], remote)  # pdsh
    words = subprocess.run(
        ["bash", "-c", remote.replace(sys.executable, "printf '%s\\0'", 1)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    assert words[words.index("--run") : -1] == options


def test_its_environment_file(
    tmp_path: Path, hostfile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comments would crash DeepSpeed; the user's own file is taken over; nothing secret is."""
    (tmp_path / ".deepspeed_env").write_text("# mine\nFROM_FILE=1\n\nNCCL_DEBUG=INFO\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    debugging = {
        "DEEPSPEED_TIMEOUT": "20",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
        "TORCH_CPP_LOG_LEVEL": "INFO",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    for name, value in debugging.items():
        monkeypatch.setenv(name, value)
    options = ["--run", str(tmp_path / "run"), "--batch.global", "32"]
    command = launchers.deepspeed(["quickstart"], "auto", options, hostfile, env=["A=b c"])
    file = command.env_file
    assert file and file.path.is_absolute()
    assert command.environment["DS_ENV_FILE"] == str(file.path)
    found = dict(line.split("=", 1) for line in file.text.splitlines())
    assert found["A"] == "b c" and found["NCCL_DEBUG"] == "WARN" and found["OMP_NUM_THREADS"]
    assert found["PATH"].startswith(f"{BIN}:") and debugging.items() <= found.items()
    assert "WANDB_API_KEY" not in found and "#" not in file.text
    with pytest.raises(LaunchError, match=r"A='\$x'.*can't hand"):
        launchers.deepspeed(["quickstart"], "auto", options, hostfile, env=["A=$x"])
    with pytest.raises(LaunchError, match="--env NOT_SET: it is not set here"):
        given_environment(["NOT_SET"], {})
    assert rank_environment(["B"], {"B": "1", "C": "2"}).keys() == {"B", "OMP_NUM_THREADS", "PATH"}


def test_what_its_environment_file_can_not_hold(
    tmp_path: Path, hostfile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the logs goes through it too; the user's own may be no text."""
    options = ["--batch.global", "32", "--run"]
    with pytest.raises(LaunchError, match=r"run = '.*\$HOME'.*can't hand this path.*another --run"):
        launchers.deepspeed(["quickstart"], "auto", [*options, f"{tmp_path}/$HOME"], hostfile)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_bytes(b"A=\xff\n")
    with pytest.raises(LaunchError, match=r"\.deepspeed_env: can't be read \(.*; mend it"):
        launchers.deepspeed(["quickstart"], "auto", [*options, str(tmp_path)], hostfile)


def test_hosts_may_have_addresses_of_ipv6() -> None:
    """Between brackets before a port, as torchrun's parser has it; alone elsewhere."""
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    hosts = elastic.Hosts(2, 1, 2, "[fd00::1]:29500", "fd00::2")
    options = ["--batch.global", "32"]
    words = elastic.torchrun(["quickstart"], "auto", options, hosts, "a")
    endpoint = words.words[words.words.index("--rdzv-endpoint") + 1]
    assert parse_rendezvous_endpoint(endpoint, 0) == ("fd00::1", 29500)
    other = elastic.accelerate(["quickstart"], "auto", options, hosts)
    assert yaml.safe_load(other.files[0].text)["main_process_ip"] == "fd00::1"
    for command in (words, other):
        assert command.ranks and command.ranks.first_host
        assert command.ranks.first_host.address == "fd00::1"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["no such file"]),
        ("", ["has no host"]),
        ("a slots=1\na slots=2\n", ["line 2", "a is there already"]),
        ("a slot=1\n", ["line 1", "`host slots=N`"]),
        ("a slots=1 b slots=2\n", ["line 1"]),  # DeepSpeed would take the half of it
        ("# x\na slots=0\n", ["line 2"]),
    ],
)
def test_hostfile_mistakes(tmp_path: Path, text: str | None, parts: list[str]) -> None:
    path = tmp_path / "hostfile"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LaunchError) as failure:
        read_hostfile(path)
    assert all(part in str(failure.value) for part in [str(path), *parts]), failure.value


def test_mistakes_about_hosts(hostfile: Path, fails: Callable[..., str]) -> None:
    on = ["launch", "deepspeed", "--config", "quickstart", "--hostfile", hostfile]
    assert "--no-ssh and --node-rank" in fails(*on, "--no-ssh")
    many = ["--batch.global", "32"]
    assert "--node-rank 2" in fails(*on, "--no-ssh", "--node-rank", "2", *many)
    for name, flag in (("torchrun", "--rdzv-endpoint"), ("accelerate", "--master")):
        by_hand = ["launch", name, "--config", "quickstart", "--processes-per-node", 1]
        assert "--node-rank is missing" in fails(*by_hand, "--nodes", 2)
        assert f"{flag} is missing" in fails(*by_hand, "--nodes", 2, "--node-rank", 0)
        two = [*by_hand, "--nodes", 2, flag]
        assert "is not HOST:PORT" in fails(*two, "node1", "--node-rank", 0)
        for address in ("[fd00::1", "fd00::1", "fd00::1:29500", "[fd00::1:29500"):
            assert "as in [fd00::1]:29500" in fails(*two, address, "--node-rank", 0), address
        assert "count from 0" in fails(*two, "127.0.0.1:1", "--node-rank", 2)
        assert "give --nodes N" in fails(*by_hand, "--node-rank", 1)
    assert "--sbatch" in fails("launch", "slurm", "--config", "quickstart", "--sbatch", "gpu:1")
    assert "is no time limit" in fails(
        "launch", "slurm", "--config", "quickstart", "--time", "1 day"
    )
    assert "--warning-s 600" in fails(
        "launch", "slurm", "--config", "quickstart", "--time", "5", "--warning-s", "600"
    )
    for number in ("0", "70000"):
        assert "is not a port" in fails(*on, "--master-port", number)
        assert "is not a port" in fails(*on, "--ssh-port", number)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; returns its one sentence."""

    def run(*words: object) -> str:
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(str(end.code))
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1, error
        return error

    return run


# ---- processes


def test_run_passes_the_exit_code_on() -> None:
    from convnext_yolo.launch.supervision.supervise import run

    with pytest.raises(LaunchError) as failure:
        run(lambda _: Command(["sh", "-c", "exit 7"]))
    assert failure.value.exit_code == 7
    run(lambda _: Command(["sh", "-c", 'test "$A" = b'], {"A": "b"}))


def test_the_files_of_accelerate_are_one_for_each_host(
    tmp_path: Path, tiny_recipe: Callable[..., Path]
) -> None:
    recipe = str(tiny_recipe(tmp_path))
    files = [
        elastic.accelerate([recipe], "auto", [], elastic.Hosts(2, k, 2, "h:1")).files[0]
        for k in (0, 1)
    ]
    assert len({file.path for file in files}) == 2
    assert [yaml.safe_load(file.text)["machine_rank"] for file in files] == [0, 1]
