"""DeepSpeed's launcher, on this machine and over the hosts of a hostfile.

What DeepSpeed hands to other hosts goes through pdsh and a shell there, which it quotes by halves;
`_remote_word` makes whole what it leaves.
"""

import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from ..recipes.load import load_recipe, recipe_path
from .addresses import free_port
from .command import Command, File, program
from .hostfile import read_hostfile
from .job import (
    Job,
    LaunchError,
    describe_job,
    fitting,
    given_environment,
    gpus_here,
    rank_environment,
)

_NOT_HANDED_ON = r'["$`\\%\n]'  # shells on the way expand or drop these in a variable's value
# What means nothing to a shell, pdsh or DeepSpeed's own quoting.
_PLAIN = re.compile(r"[\w@+=:,./-]*", re.ASCII)


def local(
    configs: Sequence[str], resume: str, options: Sequence[str], processes: int | None
) -> Command:
    """The deepspeed launcher on this machine.

    Without a number of processes: the GPUs, as many as share the batch equally, or one process
    on the CPU.
    """
    gpus = gpus_here()
    if processes is None:
        recipe = load_recipe([recipe_path(name) for name in configs], options)
        processes = fitting(recipe, gpus) if gpus else 1
    elif gpus and processes > gpus:
        raise LaunchError(f"--processes {processes}: this machine has {gpus} GPU(s)")
    job = describe_job(configs, resume, options, [processes], f"--processes {processes}")
    environment = {}
    if not gpus:
        threads = max(1, (os.cpu_count() or 1) // processes)
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    words = [program("deepspeed"), *_devices(processes, os.environ if gpus else {})]
    words += ["--master_port", str(free_port())]
    # A container may have a /job/hostfile, which DeepSpeed would read.
    words += ["--hostfile", os.devnull]
    words += ["--log_level", "error"]  # on one machine its news of hosts and ranks is noise
    return Command([*words, *_ranks(job.train_words)], environment, ranks=job.ranks())


def deepspeed(
    configs: Sequence[str],
    resume: str,
    options: Sequence[str],
    hostfile: Path,
    *,
    node_rank: int | None = None,
    master_address: str | None = None,
    master_port: int = 29500,
    ssh_port: int | None = None,
    env: Sequence[str] = (),
    lost: Collection[str] = (),
) -> Command:
    """The deepspeed launcher over the hosts of a hostfile: by pdsh, or by hand on each.

    Args:
        configs: recipe files or names.
        resume: as `train` takes it.
        options: keys of the recipe.
        hostfile: lines of `host slots=N`.
        node_rank: which line of the hostfile this host is, where each is started by hand.
        master_address: of the first host; by default its name in the hostfile.
        master_port: free on the first host.
        ssh_port: where it is not ssh's own.
        env: `NAME=VALUE` or `NAME` for the ranks.
        lost: hosts that are left out.

    Raises:
        LaunchError, RecipeError: a mistake, in one sentence.
    """
    if node_rank is not None:
        lost = ()  # this host can't leave out any: the others would not know
    named = read_hostfile(hostfile)
    hosts = {k: n for k, n in named.items() if k not in lost}
    if not hosts:
        raise LaunchError(f"hostfile {hostfile}: all its hosts are lost")
    if next(iter(named)) in lost:  # the address that was given is that host's
        master_address = None
    job = describe_job(
        configs,
        resume,
        options,
        list(hosts.values()),
        f"hostfile {hostfile}: {sum(hosts.values())} slots on {len(hosts)} host(s)",
        # Without an address DeepSpeed asks the first host by ssh for all it has, and takes the
        # first: a container bridge's, if it is unlucky.
        master_address=master_address or next(iter(hosts)).rpartition("@")[2],
        master_port=master_port,
        environment=rank_environment(env, {**deepspeed_env(os.environ), **os.environ}),
    )
    files: tuple[File, ...] = ()
    if lost:
        left = "".join(f"{host} slots={slots}\n" for host, slots in hosts.items())
        files = (File(job.folder / "hostfile", left),)
        hostfile = files[0].path
    words = [program("deepspeed"), "--hostfile", str(hostfile.absolute())]
    words += ["--master_addr", job.master_address, "--master_port", str(job.master_port)]
    if node_rank is not None:
        if node_rank >= len(hosts):
            raise LaunchError(
                f"--node-rank {node_rank}: hostfile {hostfile} has {len(hosts)} host(s); they "
                "count from 0"
            )
        words += ["--no_ssh", "--node_rank", str(node_rank)]
        first = sum(list(hosts.values())[:node_rank])
        here = list(hosts)[node_rank]
        mine = {first + k: here for k in range(hosts[here])}
        return Command(
            [*words, *_ranks(job.train_words)],
            given_environment(env, os.environ),
            ranks=job.ranks_of_host(node_rank, mine),
        )
    words += ["--log_level", "warning"]  # its news has every variable in it, several times
    words.append("--force_multi")  # also one host is the one named, not this one
    if ssh_port:
        words += ["--ssh_port", str(ssh_port)]
    _check_remote_shell(Path.cwd(), program("python"))
    file = _env_file(job)
    names = [host for host, slots in hosts.items() for _ in range(slots)]
    return Command(
        [*words, *_ranks(map(_remote_word, job.train_words))],
        # Instead of ~/.deepspeed_env, whose settings are in it; ours alone of all jobs.
        # And no ssh of ours becomes the master of other sessions: it ends with the job.
        {"DS_ENV_FILE": str(file.path), "PDSH_SSH_ARGS_APPEND": _ssh_options()},
        files,
        job.ranks(dict(enumerate(names)), (*reversed(hosts), job.master_address)),
        file,
    )


def deepspeed_env(environment: Mapping[str, str]) -> dict[str, str]:
    """What the user's own `.deepspeed_env` files set, at home and here. Comments are no harm.

    Raises:
        LaunchError: one can't be read.
    """
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    found = {}
    for folder in (Path.home(), Path()):  # DeepSpeed's order, the last wins
        path = folder / name
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise LaunchError(f"{path.absolute()}: can't be read ({error}); mend it") from None
            for line in lines:
                key, equals, value = line.strip().partition("=")
                if equals and not key.startswith("#"):
                    found[key.strip()] = value.strip()
    return found


def _ssh_options() -> str:
    return f"-oControlMaster=no {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}".strip()


def _devices(processes: int, environment: Mapping[str, str]) -> list[str]:
    """As many of the GPUs that this process may see: DeepSpeed's --num_gpus takes any."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return ["--num_gpus", str(processes)]
    if not re.fullmatch(r"\d+(,\d+)*", visible):
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES={visible}: the deepspeed launcher takes only numbers there; "
            "use `launch torchrun`"
        )
    return ["--include", "localhost:" + ",".join(visible.split(",")[:processes])]


def _ranks(words: Iterable[str]) -> list[str]:
    # Ranks learn their number from the environment, not from --local_rank.
    return ["--no_local_rank", "--module", *words]


def _env_file(job: Job) -> File:
    """The variables that DeepSpeed exports on every host. It knows no comments and no empty lines.

    Raises:
        LaunchError: a value that would not arrive as it is.
    """
    if re.search(_NOT_HANDED_ON, job.recipe.run):  # where logs lie is handed on as well
        raise LaunchError(
            f"run = {job.recipe.run!r}: DeepSpeed can't hand this path to other hosts; choose "
            "another --run, without quotes, $, `, \\ and %"
        )
    for name, value in job.environment.items():
        if re.search(_NOT_HANDED_ON, value) or value != value.strip():
            raise LaunchError(
                f"{name}={value!r}: DeepSpeed can't hand this value to other hosts; set it there, "
                f"or give another by --env {name}=VALUE"
            )
    lines = "".join(f"{name}={value}\n" for name, value in job.environment.items())
    return File(job.folder / "deepspeed_env", lines)


def _remote_word(word: str) -> str:
    """A word that is the same again after DeepSpeed's quoting, pdsh and the other host's shell."""
    word = word.replace("%", "%%")  # pdsh puts the host's name for %h, and so on
    if _PLAIN.fullmatch(word):
        return word
    if " " in word:  # DeepSpeed puts it between double quotes and escapes those within
        return re.sub(r"[\\$`]", r"\\\g<0>", word)
    return shlex.quote(word)


def _check_remote_shell(*paths: Path | str) -> None:
    for path in paths:
        if not _PLAIN.fullmatch(str(path)):
            raise LaunchError(
                f"{path}: DeepSpeed can't name this path to other hosts, for its spaces or special "
                "characters; use one without"
            )
