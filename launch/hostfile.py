"""The hostfile: lines of `host slots=N`, as DeepSpeed and MPI have them."""

import re
from pathlib import Path

from .job import LaunchError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def read_hostfile(path: Path) -> dict[str, int]:
    """The hosts, in their order, and the processes of each.

    DeepSpeed's own parser takes a line that only begins well; what it would misread is refused.

    Raises:
        LaunchError: names the file, the line and the mend.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise LaunchError(
            f"hostfile {path}: no such file; it holds lines of `host slots=N`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"hostfile {path}: can't be read ({error})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if not match or int(match[2]) < 1:
            raise LaunchError(
                f"hostfile {path}, line {number}: {line!r} is not `host slots=N`, with N the "
                "processes of that host"
            )
        if match[1] in hosts:
            raise LaunchError(
                f"hostfile {path}, line {number}: {match[1]} is there already; give each host "
                "one line with all its slots"
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise LaunchError(f"hostfile {path}: has no host; it holds lines of `host slots=N`")
    return hosts
