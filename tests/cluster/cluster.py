"""A cluster on one machine: hosts, ssh, pdsh and Slurm, for tests and to try launch settings."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from . import services
from .hosts import HOSTS_MAX, ClusterError, Host, Switch, wait_for

# what Slurm calls a host that answers, in `sinfo --format=%t`
_USABLE = ("idle", "mix", "alloc", "comp")


def obstacle(slurm: bool = True) -> str:
    """Why a cluster cannot be built here, in a sentence; empty when it can."""
    packages = {
        **services.SSH_PACKAGES,
        **(services.SLURM_PACKAGES if slurm else {}),
        "ip": "iproute2",
        "unshare": "util-linux",
    }
    missing = [package for program, package in packages.items() if not shutil.which(program)]
    if missing:
        return f"the cluster needs programs (apt-get install {' '.join(sorted(set(missing)))})"
    if os.geteuid() != 0:
        return "the cluster is made of namespaces, which takes root"
    words = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(words, capture_output=True).returncode:
        return "namespaces are not allowed here: a container needs --privileged for the cluster"
    return ""


def environment() -> dict[str, str]:
    """What `Host.start` gives to programs; an ssh session has nothing of it, as on any cluster."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "PDSH_RCMD_TYPE": "ssh",
    }


class Cluster:
    """N hosts with names, ssh and pdsh, and Slurm if wanted; up inside a `with`.

    `hosts[0]` is nodeA at 10.77.0.1, and so on. Files lie in `folder`, a temporary one that goes
    with the cluster unless it is given.
    """

    def __init__(self, hosts: int = 2, slurm: bool = True, folder: Path | None = None):
        if not 1 <= hosts <= HOSTS_MAX:
            raise ClusterError(f"a cluster has 1 to {HOSTS_MAX} hosts, not {hosts}")
        if reason := obstacle(slurm):
            raise ClusterError(reason)
        self.slurm = slurm
        self._stack = ExitStack()
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="cluster-"))
            self._stack.callback(shutil.rmtree, folder)
        self.folder = folder
        self.environment = environment()
        self.hosts = [Host(n, folder, self.environment) for n in range(1, hosts + 1)]
        self.hostfile = folder / "hostfile"
        self.ssh_config = folder / "etc/ssh/ssh_config"

    def __enter__(self) -> Cluster:
        with self._stack:  # what is there is taken down if the rest fails
            services.configure(self.folder, self.hosts, self.slurm)
            self.hostfile.write_text("".join(f"{h.address} slots=1\n" for h in self.hosts))
            self._switch = Switch()
            self._stack.callback(self._switch.close)
            for host in self.hosts:
                self._stack.callback(host.kill)
                self._boot(host)
            self.wait_until_ready()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    def down(self) -> None:
        """Takes all of it down: processes, namespaces, interfaces, mounts, files."""
        self._stack.close()

    def kill(self, host: Host) -> None:
        """Kills every process of a host and takes it off the network, at once.

        The kernel closes the connections of killed processes, so their peers notice; after
        `cut(host)` they do not, as when a machine loses its power.
        """
        host.kill()
        self._switch.unplug(host.number)

    def restart(self, host: Host) -> None:
        """Boots a killed host with all its services; its disk, /run and /dev/shm are empty."""
        self._boot(host)
        self.wait_until_ready()

    def cut(self, host: Host) -> None:
        """Sets the host's link down; what is sent meanwhile is lost, connections stay."""
        host.set_link("down")

    def join(self, host: Host) -> None:
        """Sets the host's link up again."""
        host.set_link("up")

    def mend(self) -> None:
        """Brings back what tests broke: jobs and processes left, hosts that are dead or cut."""
        usable = {host.name for host in self.hosts if host.alive and host.link_is_up()}
        if self.slurm and self.hosts[0].name in usable:
            usable &= self._hosts_in(_USABLE)  # Slurm itself would take half a minute to mend one
        for host in self.hosts:
            if host.name not in usable:
                if host.alive:
                    self.kill(host)
                self._boot(host)
        if self.slurm:
            self.hosts[0].run(["scancel", "--user=root"])
        for host in self.hosts:
            for pid, line in host.processes().items():
                if not line.startswith(services.DAEMONS):
                    with suppress(ProcessLookupError):  # it has ended meanwhile
                        os.kill(pid, signal.SIGKILL)
        self.wait_until_ready("idle")

    def wait_until_ready(self, *states: str) -> None:
        """Waits until Slurm calls all hosts that live one of these (default: usable)."""
        if not self.slurm:
            return  # ssh answers after boot
        states = states or _USABLE
        alive = {host.name for host in self.hosts if host.alive}
        try:
            wait_for(lambda: alive <= self._hosts_in(states), f"all hosts are {states}", 60)
        except ClusterError as error:
            log = (self.folder / "log/slurmctld.log").read_text().splitlines()[-20:]
            raise ClusterError("\n".join([str(error), *log])) from error

    def _hosts_in(self, states: Sequence[str]) -> set[str]:
        words = ["sinfo", "--noheader", "--Node", "--partition=all", "--format=%N %t"]
        nodes = [line.split() for line in self.hosts[0].run(words).splitlines()]
        return {name for name, state in nodes if state in states}

    def _boot(self, host: Host) -> None:
        host.boot(self._switch)
        services.start_ssh(self.folder, host)
        if self.slurm:
            services.start_slurm(self.folder, host, self.hosts[0])
