"""The plain scripts and templates: they are well-formed, and do what the wrapper does."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from convnext_yolo.launch import slurm
from convnext_yolo.launch.commands import build_parser
from convnext_yolo.launch.hostfile import read_hostfile
from convnext_yolo.launch.job import HANDED_ON
from convnext_yolo.launch.slurm_job import srun_words
from convnext_yolo.recipes.load import load_recipe, recipe_path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
ROOT = LAUNCH.parent
SCRIPTS = ("deepspeed.sh", "torchrun.sh", "accelerate.sh", "slurm.sbatch", "sge.sh")
RECIPE = ["--config", "quickstart", "--resume", "auto", "--optimizer.lr", "0.1"]


def kubernetes_script() -> str:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    [container] = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    return str(container["args"][0])


@pytest.mark.parametrize("name", ["slurm.sbatch", "sge.sh", "kubernetes.yaml"])
def test_the_recipe_divides_among_the_ranks_that_are_asked_for(name: str) -> None:
    text = (LAUNCH / name).read_text()
    found = re.search(r"recipe=\(--config (\S+) (.*)\)", text)
    assert found
    recipe = load_recipe([recipe_path(found[1])], shlex.split(found[2]))
    assert (recipe.batch.global_size // recipe.batch.micro) % 16 == 0
    nodes, tasks = r"#SBATCH --nodes=2", r"#SBATCH --ntasks-per-node=8"
    asked = {"slurm.sbatch": f"{nodes}\n{tasks}", "sge.sh": "-pe mpi 16", "kubernetes.yaml": ": 8"}
    assert asked[name] in text


def test_the_example_of_a_hostfile_takes_the_recipe_as_it_is() -> None:
    recipe = load_recipe([recipe_path("convnext_tiny_coco")])
    slots = sum(read_hostfile(LAUNCH / "hostfile.example").values())
    assert (recipe.batch.global_size // recipe.batch.micro) % slots == 0


def test_shellcheck(component: Callable[[str], Path], tmp_path: Path) -> None:
    shellcheck = component("shellcheck")
    rendered = tmp_path / "job.sbatch"
    command = slurm.slurm(
        ["quickstart"], "auto", ["--run", str(tmp_path / "a b")], slurm.Allocation(env=("A=b c",))
    )
    rendered.write_text(command.files[1].text)
    pod = tmp_path / "pod.sh"
    pod.write_text("#!/bin/bash\n" + kubernetes_script())
    files = [*(LAUNCH / name for name in SCRIPTS), rendered, pod]
    result = subprocess.run([shellcheck, *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def programs(folder: Path, **texts: str) -> Path:
    """Programs of those names, in bash, instead of the real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def run(
    words: list[object], folder: Path, stubs: Path, **environment: object
) -> subprocess.CompletedProcess[str]:
    path = f"{stubs}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **{k: str(v) for k, v in environment.items()}}
    return subprocess.run(
        list(map(str, words)), cwd=folder, env=env, capture_output=True, text=True
    )


PRINTS = 'printf \'%s\\n\' "$(basename "$0")" "$@"'


def test_deepspeed_sh(tmp_path: Path) -> None:
    """DeepSpeed's own parsers take its command and its environment file."""
    from deepspeed.launcher import runner

    stubs = programs(tmp_path / "bin", deepspeed=f'{PRINTS}; cat "$DS_ENV_FILE" >{tmp_path}/env')
    words = [LAUNCH / "deepspeed.sh", LAUNCH / "hostfile.example", "quickstart"]
    mine = {
        "NCCL_DEBUG": "INFO",
        "NCCL_P2P_DISABLE": "1",
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": 0,
    }
    (tmp_path / ".deepspeed_env").write_text("# mine\nMY_SWITCH=1\n\n")
    result = run([*words, "--optimizer.lr", "0.1"], tmp_path, stubs, BIN=stubs, **mine)
    assert result.returncode == 0, result.stderr
    args = runner.parse_args(result.stdout.splitlines()[1:])
    assert sum(runner.fetch_hostfile(args.hostfile).values()) == 8
    assert (args.master_addr, args.force_multi, args.module) == ("node1", True, True)
    assert args.user_args == ["train", *RECIPE]
    lines = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert lines["NCCL_DEBUG"] == "INFO" and lines["PATH"].startswith(str(stubs))
    assert (lines["NCCL_P2P_DISABLE"], lines["WANDB_MODE"], lines["MY_SWITCH"]) == (
        "1",
        "offline",
        "1",
    )
    assert "WANDB_API_KEY" not in lines
    assert run(words[:1], tmp_path, stubs).returncode == 2


def test_deepspeed_sh_hands_on_what_the_launch_does(tmp_path: Path) -> None:
    names = re.findall(r"^names\+?='(.*)'$", (LAUNCH / "deepspeed.sh").read_text(), re.M)
    script = set("".join(names).split("|"))
    # PATH and the threads are set by the script itself
    assert script | {"PATH", "OMP_NUM_THREADS"} == set(HANDED_ON.pattern.split("|"))


def test_deepspeed_sh_with_a_user_in_the_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\nme@n1 slots=2\nme@n2 slots=2\n")
    stubs = programs(tmp_path / "bin", deepspeed=PRINTS)
    result = run([LAUNCH / "deepspeed.sh", "hosts", "quickstart"], tmp_path, stubs, BIN=stubs)
    words = result.stdout.splitlines()
    assert words[words.index("--master_addr") + 1] == "n1"


def test_torchrun_sh(tmp_path: Path) -> None:
    from torch.distributed import run as distributed_run

    route = "echo '10.0.0.1 dev eth0 src 10.0.0.2 uid 0'"
    stubs = programs(tmp_path / "bin", torchrun=PRINTS, ip=route)
    words: list[object] = [LAUNCH / "torchrun.sh", 2, 1, "10.0.0.1:29500", 8, "quickstart"]
    result = run([*words, "--optimizer.lr", "0.1"], tmp_path, stubs, BIN=stubs)
    assert result.returncode == 0, result.stderr
    args = distributed_run.get_args_parser().parse_args(result.stdout.splitlines()[1:])
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("2", "8", "c10d")
    assert (args.rdzv_conf, args.local_addr) == ("is_host=0", "10.0.0.2")
    assert args.training_script_args == ["train", *RECIPE]
    first = run([*words[:2], 0, *words[3:]], tmp_path, stubs, BIN=stubs)
    assert "is_host=1" in first.stdout.splitlines()
    assert run(words[:3], tmp_path, stubs, BIN=stubs).returncode == 2
    for endpoint, says in (
        ("no-such:29500", "no-such can't be found"),
        ("n1", "is not HOST0:PORT"),
    ):
        wrong = run([*words[:3], endpoint, *words[4:]], tmp_path, stubs, BIN=stubs)
        assert wrong.returncode == 2 and says in wrong.stderr


def test_accelerate_sh(tmp_path: Path) -> None:
    from accelerate.commands import launch

    stubs = programs(tmp_path / "bin", accelerate=PRINTS)
    words: list[object] = [LAUNCH / "accelerate.sh", 2, 1, "node1:29500", 8, "quickstart"]
    result = run([*words, "--optimizer.lr", "0.1"], tmp_path, stubs, BIN=stubs)
    assert result.returncode == 0, result.stderr
    args = launch.launch_command_parser().parse_args(result.stdout.splitlines()[2:])
    assert (args.num_machines, args.machine_rank, args.num_processes) == (2, 1, 16)
    assert (args.main_process_ip, args.main_process_port) == ("node1", 29500)
    assert args.multi_gpu and not args.use_deepspeed and args.same_network
    assert args.training_script_args == ["train", *RECIPE]


def test_the_plain_slurm_script_is_the_rendered_one_but_for_its_head() -> None:
    plain = (LAUNCH / "slurm.sbatch").read_text().partition(slurm.MARK)
    assert plain[1] and plain[2] == slurm.TEMPLATE.read_text().partition(slurm.MARK)[2]
    assert "--signal=USR1@" in plain[0] and "--requeue" in plain[0]


def test_ranks_and_probes_get_the_environment_of_a_job_that_was_given_none() -> None:
    """After `sbatch --export=NONE`, srun would hand none of the job's own on."""
    calls = re.findall(r"\bsrun (-.*)", (LAUNCH / "slurm.sbatch").read_text())
    assert [call.split()[0] for call in calls] == ["--export=ALL"]
    assert "--export=ALL" in srun_words("node1", ["true"])


@pytest.mark.parametrize(
    ("ranks", "finished", "state", "code", "requeued"),
    [
        (0, 0, "RUNNING", 0, False),  # done
        (0, 1, "RUNNING", -9, True),  # stopped by a signal: Slurm ends the script
        (0, 1, "CANCELLED", 0, False),  # what a user has cancelled stays so
        (3, 1, "RUNNING", 3, False),  # what failed would fail again
        (75, 1, "RUNNING", -9, True),  # a host was lost
        (0, 1, "busy", 1, False),  # Slurm's controller does not answer: not done, at least
    ],
)
def test_when_a_slurm_job_goes_back_into_the_queue(
    tmp_path: Path, ranks: int, finished: int, state: str, code: int, requeued: bool
) -> None:
    stubs = programs(
        tmp_path / "bin",
        python='if [[ $2 == *.allocation ]]; then while [ "$1" != -- ]; do shift; done; shift; '
        f'"$@"; exit; fi\nif [[ $2 == *.finished ]]; then exit {finished}; fi\n'
        "if [[ $3 == doctor ]]; then exit; fi\n"
        f"{PRINTS}; exit {ranks}",
        srun="while [[ $1 == -* ]]; do shift; done; export SLURM_NTASKS=16 SLURM_LOCALID=3 \\\n"
        f'SLURM_PROCID=11; "$@"; code=$?; env >{tmp_path}/env; exit $code',
        scontrol='if [ "$1" = show ]; then echo node1; echo node2; exit; fi\n'
        f"if [ ! -e {tmp_path}/once ]; then touch {tmp_path}/once; exit 1; fi\n"  # it is busy
        f'echo "$@" >{tmp_path}/requeued; kill -KILL $PPID',
        squeue=f"if [ {state} = busy ]; then exit 1; fi; echo {state}",
    )
    body = (LAUNCH / "slurm.sbatch").read_text().replace("python=.venv/bin/python", "python=python")
    (tmp_path / "job").write_text(body.replace("\nresume=auto", "\nresume=never"))
    job = {"SLURM_JOB_ID": 123456, "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_CPUS_PER_TASK": 5}
    result = run(["bash", "job"], tmp_path, stubs, SLURM_RESTART_COUNT=finished, RETRY_S=0, **job)
    assert result.returncode == code, result.stderr
    assert (tmp_path / "requeued").exists() == requeued
    lines = result.stdout.splitlines()
    # a job that was started before goes on, whatever its first start was told
    assert lines[lines.index("--resume") + 1] == ("auto" if finished else "never")
    environment = (tmp_path / "env").read_text().splitlines()
    assert {"MASTER_ADDR=node1", "MASTER_PORT=13456", "SRUN_CPUS_PER_TASK=5"} <= set(environment)


@pytest.mark.parametrize("doctor", ["yes", "no"])
def test_a_slurm_job_asks_the_doctor_first(tmp_path: Path, doctor: str) -> None:
    """With what the ranks get; an error ends the job, which Slurm then does not start again."""
    stubs = programs(tmp_path / "bin", python=f"{PRINTS}; exit 1", scontrol="echo node1")
    body = (LAUNCH / "slurm.sbatch").read_text().replace("python=.venv/bin/python", "python=python")
    (tmp_path / "job").write_text(body.replace("\ndoctor=yes", f"\ndoctor={doctor}"))
    job = {"SLURM_JOB_ID": 123456, "SLURM_JOB_NODELIST": "node1"}
    result = run(["bash", "job"], tmp_path, stubs, **job)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    at = lines.index("doctor" if doctor == "yes" else "train")
    assert ("train" in lines) == (doctor == "no")
    if doctor == "yes":
        options, _ = build_parser().parse_known_args(lines[at:])
        assert options.slurm and options.master_port == 13456 and options.resume == "auto"


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.02)


WAITS = 'trap "kill \\$!; exit {code}" {signals}; sleep 999 & touch {folder}/up; wait $!'


@pytest.mark.parametrize(
    ("number", "stopped", "finished", "code"),
    [
        (None, 0, 0, 0),
        ("USR1", 0, 1, 99),
        ("USR2", 0, 1, 99),
        ("USR2", 130, 1, 99),  # while the doctor looked
        ("USR2", 1, 1, 1),  # asked, and then it failed
        (None, 130, 1, 130),  # nobody has asked
    ],
)
def test_grid_engine(
    tmp_path: Path, number: str | None, stopped: int, finished: int, code: int
) -> None:
    """Its warnings become the one that ranks know, and 99 starts the job again."""
    waits = f"exit {stopped}"
    if number:
        waits = WAITS.format(code=stopped, signals="USR1", folder=tmp_path)
    programs(
        tmp_path / ".venv/bin",
        python=f"exit {finished}",
        **{"convnext-yolo": f"{PRINTS} >{tmp_path}/words; {waits}"},
    )
    (tmp_path / "pe").write_text(  # node1 is in two queues
        "node1 6 all.q@node1 UNDEFINED\nnode2 4 all.q@node2 <NULL>\nnode1 2 gpu.q@node1 <NULL>\n"
    )
    env = {"TMPDIR": str(tmp_path), "PE_HOSTFILE": str(tmp_path / "pe"), "JOB_ID": "7"}
    process = subprocess.Popen(
        ["bash", LAUNCH / "sge.sh"], cwd=tmp_path, env={**os.environ, **env}, start_new_session=True
    )
    if number:
        until((tmp_path / "up").exists)
        os.killpg(process.pid, getattr(signal, f"SIG{number}"))
    assert process.wait(timeout=30) == code
    assert read_hostfile(tmp_path / "hostfile") == {"node1": 8, "node2": 4}
    words = (tmp_path / "words").read_text().splitlines()
    assert words[1:5] == ["launch", "deepspeed", "--hostfile", str(tmp_path / "hostfile")]


@pytest.mark.parametrize(
    ("stopped", "finished", "code"), [(False, 0, 0), (True, 1, 1), (True, 0, 0)]
)
def test_kubernetes_pods(tmp_path: Path, stopped: bool, finished: int, code: int) -> None:
    """A pod that is moved away lets its ranks save, and does not count as done."""
    waits = WAITS.format(code=0, signals="TERM", folder=tmp_path) if stopped else ""
    stubs = programs(
        tmp_path / "bin",
        torchrun=f"{PRINTS} >{tmp_path}/words; {waits}",
        python=f"exit {finished}",
    )
    env = {"WORLD_SIZE": "2", "RANK": "1", "GPUS": "8", "MASTER_ADDR": "m", "MASTER_PORT": "1"}
    env["PATH"] = f"{stubs}:{os.environ['PATH']}"
    process = subprocess.Popen(["bash", "-c", kubernetes_script()], env={**os.environ, **env})
    if stopped:
        until((tmp_path / "up").exists)
        process.terminate()
    assert process.wait(timeout=30) == code

    from torch.distributed import run as distributed_run

    words = (tmp_path / "words").read_text().splitlines()
    args = distributed_run.get_args_parser().parse_args(words[1:])
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
    assert (args.master_addr, args.master_port) == ("m", 1)
    assert args.training_script == "convnext_yolo.launch"


def test_the_kubernetes_job_is_one_that_the_operator_takes() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica["restartPolicy"] == "OnFailure"
        pod = replica["template"]["spec"]
        [container] = pod["containers"]
        assert container["name"] == "pytorch"  # the operator's own name for it
        gpus = {entry["name"]: entry["value"] for entry in container["env"]}["GPUS"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(gpus)
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_dockerfile_copies_what_there_is() -> None:
    text = re.sub(r"\\\n", "", (LAUNCH / "Dockerfile").read_text())
    instructions = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    assert instructions[0][0] == "FROM"
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions} <= known
    copied = [word for name, rest in instructions if name == "COPY" for word in rest.split()[:-1]]
    assert {"model", "data_prep", "recipes", "launch", "demo", "setup.cfg"} <= set(copied)
    assert all((ROOT / word).exists() for word in copied), copied
    for name, rest in instructions:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest]).returncode == 0, rest


def test_the_layer_of_libraries_can_be_built_without_the_source(tmp_path: Path) -> None:
    """Of what is there by then, pip must be able to make the package."""
    text = re.sub(r"^#.*\n|\\\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M)
    before, _, install = text.partition("pip install")
    assert "'.[train]'" in install.splitlines()[0]
    [copied] = re.findall(r"^COPY (.*) \./$", before, re.M)
    for word in copied.split():
        shutil.copy(ROOT / word, tmp_path)
    [folders] = re.findall(r"mkdir -p (.*?) *&&", before)
    for word in folders.split():
        (tmp_path / word).mkdir(parents=True)
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(words, cwd=tmp_path, check=True)
    assert list(tmp_path.glob("convnext_yolo-*.whl"))


def test_the_example_hostfile() -> None:
    assert read_hostfile(LAUNCH / "hostfile.example") == {"node1": 4, "node2": 4}


def test_scripts_can_be_run_and_name_packaged_recipes() -> None:
    for name in ("deepspeed.sh", "torchrun.sh", "accelerate.sh", "sge.sh"):
        assert os.access(LAUNCH / name, os.X_OK), name
    for name in ("slurm.sbatch", "sge.sh"):
        [recipe] = re.findall(r"^recipe=\((.*)\)$", (LAUNCH / name).read_text(), re.M)
        assert (ROOT / "recipes" / f"{shlex.split(recipe)[1]}.yaml").is_file()
