"""What a launcher renders: files, and the command that uses them. As text, it is a shell script."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class File:
    """A text file that a command uses. It ends with a newline."""

    path: Path
    text: str

    def __str__(self) -> str:
        """The shell lines that write it."""
        end = "EOF"
        while end in self.text.splitlines():
            end += "_"
        path = shlex.quote(str(self.path))
        return (
            f"mkdir -p {shlex.quote(str(self.path.parent))}\n"
            f"cat >{path} <<'{end}'\n{self.text}{end}\n"
        )


@dataclass(frozen=True)
class FirstHost:
    """Where the ranks of all hosts report, if each host is started by itself."""

    address: str
    port: int
    token: str  # the same on all hosts
    is_this: bool


@dataclass(frozen=True)
class Ranks:
    """What the supervision of a command's ranks needs to know."""

    hosts: dict[int, str]  # by the numbers of the ranks, as far as they are known before
    logs: Path  # folder
    callers: tuple[str, ...] = ("127.0.0.1",)  # hosts that must reach this one
    count: int = 0  # of them
    first_host: FirstHost | None = None  # None: the command starts all ranks of the job


@dataclass(frozen=True)
class Command:
    """What is run, word by word, and the files and environment that it needs beside ours."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    ranks: Ranks | None = None  # None: whoever runs the command supervises them
    env_file: File | None = None  # where ranks get their environment, if not with the command

    def __str__(self) -> str:
        """One line for a shell."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join(settings + [shlex.quote(word) for word in self.words])

    def script(self) -> str:
        """All of it for a shell, to read or to run."""
        return "\n".join([*map(str, self.all_files), str(self)])

    @property
    def all_files(self) -> tuple[File, ...]:
        """The files, that of the environment included."""
        return (*self.files, self.env_file) if self.env_file else self.files

    def with_rank_environment(self, variables: Mapping[str, str]) -> "Command":
        """The same, with further variables for every rank."""
        if not self.env_file:
            return replace(self, environment={**self.environment, **variables})
        lines = "".join(f"{name}={value}\n" for name, value in variables.items())
        return replace(self, env_file=replace(self.env_file, text=self.env_file.text + lines))


def program(name: str) -> str:
    """A program that was installed beside this Python, or of that name on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name
