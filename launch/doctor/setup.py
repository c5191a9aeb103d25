"""What the doctor is asked about, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .facts import HostFacts, Meeting, RecipeFacts
from .findings import Finding

HERE = "here"  # this machine, in findings
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What is to be run, and where: as the launchers take it.

    Attributes:
        configs: recipe files, or names of those that come with the package.
        options: `--key.sub value` words.
        resume: as `train` takes it.
        hostfile: lines of `host slots=N`; None: this machine alone.
        slurm: the hosts are those of the Slurm job that this is.
        processes: ranks on this machine; by default its GPUs, or one.
        world_size: ranks on all machines, where the others are started by hand; by default those
            of the hostfile, or of this machine.
        master_address: of the first host; by default its name in the hostfile.
        master_port: where the ranks meet.
        master_option: by which the launcher is given another place to meet.
        node_rank: which host this is, where each is started by hand; None: it is the only one, or
            all are reached by ssh.
        elsewhere: the ranks run on other hosts, which nobody knows yet: nothing is said of this one
            but what they share with it.
        ssh_port: where it is not ssh's own.
        env: `NAME=VALUE` or `NAME` for the ranks.
    """

    configs: Sequence[str]
    options: Sequence[str] = ()
    resume: str = "auto"
    hostfile: Path | None = None
    slurm: bool = False
    processes: int | None = None
    world_size: int | None = None
    master_address: str | None = None
    master_port: int = 29500
    master_option: str = "--master-port"
    node_rank: int | None = None
    elsewhere: bool = False
    ssh_port: int | None = None
    env: Sequence[str] = ()

    @property
    def is_far(self) -> bool:
        """Whether other hosts can be asked from here."""
        return self.slurm or self.hostfile is not None


@dataclass
class Examination:
    """What was found, and the facts behind it."""

    findings: list[Finding] = field(default_factory=list)
    hosts: dict[str, int] = field(default_factory=dict)  # slots
    facts: dict[str, HostFacts] = field(default_factory=dict)
    needs: RecipeFacts | None = None
    meeting: Meeting | None = None
    bandwidth_gbit: float | None = None
    notes: list[str] = field(default_factory=list)  # lines about what was measured
