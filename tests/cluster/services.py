"""What runs on each host as on a cluster: sshd with keys, and Slurm with munge.

Their configuration lies in the cluster's folder; `etc/` of it is bound over /etc on each host, so
that plain `ssh nodeB`, `pdsh` and `sbatch` work with no option.
"""

from __future__ import annotations

import re
import secrets
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .hosts import Host, wait_for

SSHD, MUNGED, SLURMCTLD, SLURMD = (
    Path("/usr/sbin") / name for name in ("sshd", "munged", "slurmctld", "slurmd")
)
# program or module: the package of Debian that has it
SSH_PACKAGES = {
    str(SSHD): "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
}
SLURM_PACKAGES = {
    str(MUNGED): "munge",
    str(SLURMCTLD): "slurmctld",
    str(SLURMD): "slurmd",
    "srun": "slurm-client",
}
# as their command lines begin
DAEMONS = (
    "sshd",
    "slurmstepd",
    "slurmctld:",
    *(str(program) for program in (SSHD, MUNGED, SLURMCTLD, SLURMD)),
)
SSH_PORT, SLURMCTLD_PORT, SLURMD_PORT = 22, 6817, 6818

_SSH_CONFIG = """\
Host node* 10.77.0.*
    User root
    IdentityFile {folder}/ssh/id_ed25519
    IdentitiesOnly yes
    GlobalKnownHostsFile {folder}/ssh/known_hosts
    UserKnownHostsFile /dev/null
    UpdateHostKeys no
    ConnectTimeout 5
    LogLevel ERROR
"""
_SSHD_CONFIG = """\
Port {port}
AddressFamily inet
HostKey {folder}/ssh/{host}
AuthorizedKeysFile {folder}/ssh/id_ed25519.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PrintLastLog no
PrintMotd no
MaxStartups 100
PidFile none
"""
# The timers are as short as Slurm allows: a lost host is noticed after SlurmdTimeout, a requeued
# job starts after cred_expire, what ignores SIGTERM is killed after KillWait.
_SLURM_CONF = """\
ClusterName=convnext
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/slurm
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
DebugFlags=NO_CONF_HASH
FirstJobId=1
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
KillWait=15
CompleteWait=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
# Nothing is confined to cgroups. Told this, slurmd is content with an empty folder, and the
# machine's own tree, of whatever version, is neither needed nor touched.
_CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"
# Two GPUs for the sake of scripts that ask Slurm for some; a job gets CUDA_VISIBLE_DEVICES only.
_GRES_CONF = """\
Name=gpu File=/dev/null
Name=gpu File=/dev/zero
"""


def configure(folder: Path, hosts: Sequence[Host], slurm: bool) -> None:
    """Writes keys and configuration files into the cluster's folder."""
    for name in ("etc/ssh", "ssh", "log"):
        (folder / name).mkdir(parents=True)
    names = [f"{host.address} {host.name}" for host in hosts]
    (folder / "etc/hosts").write_text(
        "\n".join(["127.0.0.1 localhost", "::1 localhost", *names, ""])
    )
    (folder / "etc/resolv.conf").write_text("")  # no name server: an unknown name fails at once
    # sshd refuses a locked account, which root may be on the machine
    (folder / "etc/shadow").write_text("root:*:20000:0:99999:7:::\n")
    (folder / "etc/shadow").chmod(0o600)
    _configure_ssh(folder, hosts)
    if slurm:
        _configure_slurm(folder, hosts)


def _configure_ssh(folder: Path, hosts: Sequence[Host]) -> None:
    known = []
    for key in ("id_ed25519", *(host.name for host in hosts)):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key]
        subprocess.run([*words, "-f", str(folder / "ssh" / key)], check=True)
    for host in hosts:
        public = (folder / f"ssh/{host.name}.pub").read_text()
        known.append(f"{host.name},{host.address} {public}")
        config = _SSHD_CONFIG.format(port=SSH_PORT, folder=folder, host=host.name)
        (folder / f"ssh/sshd_config_{host.name}").write_text(config)
    (folder / "ssh/known_hosts").write_text("".join(known))
    (folder / "etc/ssh/ssh_config").write_text(_SSH_CONFIG.format(folder=folder))


def _configure_slurm(folder: Path, hosts: Sequence[Host]) -> None:
    for name in ("etc/slurm", "etc/munge", "slurm"):
        (folder / name).mkdir()
    (folder / "etc/munge").chmod(0o700)
    key = folder / "etc/munge/munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    nodes = [
        f"NodeName={host.name} NodeAddr={host.address} CPUs=4 RealMemory=8000 Gres=gpu:2"
        for host in hosts
    ]
    first = f"{hosts[0].name}({hosts[0].address})"
    config = _SLURM_CONF.format(first=first, folder=folder, nodes="\n".join(nodes))
    (folder / "etc/slurm/slurm.conf").write_text(config)
    (folder / "etc/slurm/cgroup.conf").write_text(_CGROUP_CONF)
    (folder / "etc/slurm/gres.conf").write_text(_GRES_CONF)


def start_ssh(folder: Path, host: Host) -> None:
    """Starts sshd; it answers when this returns."""
    log = folder / f"log/sshd-{host.name}.log"
    host.run([SSHD, "-f", folder / f"ssh/sshd_config_{host.name}", "-E", log])
    wait_for(lambda: host.listens(SSH_PORT), f"sshd listens on {host.name}")


def _skip_job_numbers(config: Path) -> None:
    """A slurmctld that was killed forgets its last jobs; a slurmd refuses their numbers."""
    raised = lambda match: f"{match[1]}{int(match[2]) + 1000}"  # noqa: E731
    config.write_text(re.sub(r"(FirstJobId=)(\d+)", raised, config.read_text()))


def start_slurm(folder: Path, host: Host, first: Host) -> None:
    """Starts munge and slurmd, and slurmctld on the first host."""
    log = folder / f"log/munged-{host.name}.log"
    # by default it keeps the seed in a folder that belongs to the user munge
    host.run([MUNGED, f"--log-file={log}", "--seed-file=/run/munge/seed"])
    if host is first:
        _skip_job_numbers(folder / "etc/slurm/slurm.conf")
        host.run([SLURMCTLD])
        wait_for(lambda: host.listens(SLURMCTLD_PORT), "slurmctld listens")
    host.run([SLURMD])
    wait_for(lambda: host.listens(SLURMD_PORT), f"slurmd listens on {host.name}")
