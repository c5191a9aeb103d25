"""Traps in `.deepspeed_env` and the environment, before they reach other hosts.

DeepSpeed (launcher/runner.py) splits every line of the file at its first `=` and puts
`export KEY=VALUE; ` for it before the command of each host. A line without `=`, a comment or an
empty one, is a ValueError. A comment with `=` is worse: `export # a=b; cd …` makes a comment of
all that follows, so that no rank starts and the launcher ends as if all went well. `launch
deepspeed` reads these files itself and gives DeepSpeed a clean one; a plain `deepspeed` does not.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..job import HANDED_ON
from .findings import Finding, error, warning

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# The launcher sets these for each rank, after whatever the file says.
SET_BY_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
SET_BY_LAUNCHER |= {"CUDA_VISIBLE_DEVICES"}
_BY_HAND = "`launch deepspeed` reads over it, a plain `deepspeed`"


def environment_files(environment: Mapping[str, str], home: Path, folder: Path) -> list[Path]:
    """The files that DeepSpeed reads, the last one wins."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    paths = {(place / name).absolute(): None for place in (home, folder)}
    return [path for path in paths if path.is_file()]


def check_environment_files(
    files: Sequence[Path], environment: Mapping[str, str], given: Sequence[str] = ()
) -> list[Finding]:
    """Lines of `.deepspeed_env` that do something else than they seem to.

    Args:
        files: in the order in which DeepSpeed reads them.
        environment: of this process.
        given: names that are handed on by `--env`.
    """
    found = []
    if "DS_ENV_FILE" in environment and not files:
        found.append(
            warning(
                f"DS_ENV_FILE={environment['DS_ENV_FILE']}",
                "there is no such file, at home or here",
                "DeepSpeed goes on without it and without a word",
                "mend the name, or unset the variable",
            )
        )
    before: dict[str, tuple[str, Path]] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            found.append(
                error(str(file), f"can't be read ({problem})", "DeepSpeed reads it", "mend it")
            )
            continue
        for number, line in enumerate(lines, 1):
            found += _line(f"{file}, line {number}", line, given)
            key, _, value = (part.strip() for part in line.partition("="))
            if key in before and before[key][0] != value and before[key][1] != file:
                found.append(
                    warning(
                        f"{file}, line {number}",
                        f"{key} is set in {before[key][1]} as well, to {before[key][0]!r}",
                        f"this one wins, {value!r}",
                        "keep one of the two",
                    )
                )
            before[key] = (value, file)
    return found


def _line(where: str, line: str, given: Sequence[str]) -> list[Finding]:
    """What is wrong with one line."""
    key, equals, value = (part.strip() for part in line.partition("="))
    if key.startswith("#") and equals:
        why = f"{_BY_HAND} makes a comment of the whole command: no rank starts, exit code 0"
        return [warning(where, "a comment with an equals sign", why, "remove the line")]
    if not equals:
        what = "a comment" if line.strip() else "an empty line"
        what = what if not key or key.startswith("#") else f"{line.strip()!r} has no equals sign"
        why = f"{_BY_HAND} ends with a ValueError"
        return [warning(where, what, why, "remove the line")]
    if key.startswith("export "):
        why = f"DeepSpeed writes that itself; `launch deepspeed` takes {key!r} for a name"
        return [error(where, f"{key} begins with export", why, f"write {key[7:].strip()}={value}")]
    if not NAME.fullmatch(key):
        why = "the shell of each host refuses it, and the variable is not set"
        return [error(where, f"{key!r} is no variable's name", why, "write NAME=VALUE")]
    if re.search(r'["$`\\%]', value):
        why = "the shells on the way expand or drop some of these characters"
        mend = f"set {key} on the hosts themselves, or give a plain value"
        return [error(where, f"{key} = {value!r} has quotes, $, `, \\ or %", why, mend)]
    if key in SET_BY_LAUNCHER:
        why = "the launcher sets it for each rank and wins"
        return [warning(where, f"{key} is set", why, "remove the line")]
    if not HANDED_ON.fullmatch(key) and key not in given:
        why = "`launch deepspeed` hands on only what ranks are known to need, a plain one all"
        return [warning(where, f"{key} is set", why, f"give it as --env {key}")]
    return []


def check_interfaces(
    host: str, environment: Mapping[str, str], interfaces: Sequence[str]
) -> list[Finding]:
    """Network interfaces that the ranks are told to use and that a host does not have.

    Args:
        host: whose interfaces they are.
        environment: of its ranks.
        interfaces: their names.
    """
    found = []
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        wanted = environment.get(name, "")
        if not wanted or wanted.startswith("^"):
            continue
        words = wanted.removeprefix("=").split(",")
        if name.startswith("NCCL") and not wanted.startswith("="):  # how names begin
            good = any(have.startswith(word) for word in words for have in interfaces)
        else:
            good = any(word in interfaces for word in words)
        if not good:
            found.append(
                error(
                    host,
                    f"{name}={wanted}, but its interfaces are {', '.join(interfaces)}",
                    "its ranks could not call the others",
                    f"give the one that faces them: --env {name}=NAME",
                )
            )
    return found


def check_accelerator(host: str, accelerator: str, gpus: int) -> list[Finding]:
    """DS_ACCELERATOR against what there is."""
    if accelerator == "cpu" and gpus:
        return [
            error(
                host,
                f"DS_ACCELERATOR=cpu, but it has {gpus} GPU(s)",
                "the model would be on the GPU and DeepSpeed think that it is not",
                "unset DS_ACCELERATOR, or hide the GPUs with CUDA_VISIBLE_DEVICES=",
            )
        ]
    if accelerator not in ("", "cpu") and not gpus:
        return [
            error(
                host,
                f"DS_ACCELERATOR={accelerator}, but it has no GPU",
                "DeepSpeed would end while it is imported",
                "unset DS_ACCELERATOR",
            )
        ]
    return []
