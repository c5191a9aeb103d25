"""What can be wrong between hosts: ssh, the master's address and port, the first all-reduce."""

import re
from collections.abc import Mapping

from .facts import HostFacts, Meeting
from .findings import Finding, error, several, warning
from .session import CONNECT_S, ProbeError

# What ssh and the remote shell say: (pattern, what it is, the mend).
_STARTS = (
    (
        r"permission denied",
        "ssh is refused",
        "put this user's public key there (ssh-copy-id {host})",
    ),
    (
        r"could not resolve|name or service not known",
        "its name is not known here",
        "mend the hostfile, or add the name to DNS or ~/.ssh/config",
    ),
    (
        r"host key verification failed|remote host identification",
        "ssh does not trust its host key",
        "log in once by hand (ssh {host}), or add its key to known_hosts",
    ),
    (r"connection refused", "nothing listens for ssh", "start sshd there, or give --ssh-port"),
    (
        r"timed out|no route|network is unreachable|closed by remote|banner exchange",
        "ssh can't reach it",
        "look whether the host is up and no firewall is between",
    ),
    (
        r"no module named .?(convnext_yolo|pydantic|yaml)",
        "the package is not installed there for {python}",
        "install the same environment at the same path",
    ),
    (
        r"no such file|not found|cannot execute|permission denied: ",
        "{python} does not run there",
        "install the same environment at the same path",
    ),
    (
        r"another version of the package",
        "the package there is another version",
        "install the same version on all hosts",
    ),
)


def check_start(host: str, silence: ProbeError, python: str, by_srun: bool = False) -> Finding:
    """A host on which no probe could be started, by ssh or, in a Slurm job, by srun."""
    why = "the launcher starts its ranks in the same way"
    if by_srun:
        mend = f"`srun --nodelist={host} {python} -V` in a job must answer at once"
        return error(host, f"srun starts no probe there: {silence.said}", why, mend)
    for pattern, what, mend in _STARTS:
        if re.search(pattern, silence.said, re.IGNORECASE):
            what, mend = what.format(python=python), mend.format(host=host)
            return error(host, f"{what} ({silence.said})", why, mend)
    if silence.code is None:
        mend = f"`ssh -o BatchMode=yes {host} {python} -V` must answer at once"
        return error(host, f"ssh connects, but {python} gives {silence.said}", why, mend)
    mend = f"`ssh -o BatchMode=yes -o ConnectTimeout={CONNECT_S} {host} hostname` must work"
    return error(host, f"no probe could be started there: {silence.said}", why, mend)


def check_port(
    host: str, port: int, busy: str, range_: tuple[int, int], option: str = "--master-port"
) -> list[Finding]:
    """The port on which the ranks meet, on the first host.

    Args:
        host: the first one.
        port: there.
        busy: why it can't be taken.
        range_: of the ports that its kernel gives away.
        option: by which another is given.
    """
    if busy:
        what = f"port {port} can't be taken: {busy}"
        mend = f"end what uses it, or give another {option}"
        return [error(host, what, "the ranks meet there", mend)]
    if range_[0] <= port <= range_[1]:
        what = f"port {port} is among those that the kernel gives away ({range_[0]}-{range_[1]})"
        mend = f"give a port below {range_[0]}: {option}"
        return [warning(host, what, "it may be taken when the ranks want to meet there", mend)]
    return []


def check_name(host: str, address: str, unknown: str) -> list[Finding]:
    """The name of the first host, as a host that is started by hand finds it."""
    if not unknown:
        return []
    what = f"{address} can't be found ({unknown})"
    mend = "give the first host's address instead, or add its name to DNS or /etc/hosts"
    return [
        error(host, what, "the ranks meet at that host, and those here would wait or end", mend)
    ]


def check_address(first: str, address: str, port: int, errors: Mapping[str, str]) -> list[Finding]:
    """Hosts that can't reach the first one's port."""
    unreached = {host: reason for host, reason in errors.items() if reason}
    why = "ranks there would wait half an hour for the others"
    if len(unreached) == len(errors):
        reason = next(iter(unreached.values()))
        what = f"no host reaches it as {address}, port {port} ({reason})"
        mend = "give the address that faces the other hosts: --master-addr"
        return [error(first, what, why, mend)]
    return [
        error(
            host,
            f"can't reach {address}, port {port} ({reason})",
            why,
            f"open the port from this host to {first} (firewall, security group), or give another "
            "--master-addr or --master-port",
        )
        for host, reason in unreached.items()
    ]


def check_meeting(meetings: Mapping[str, Meeting], use_gpu: bool) -> list[Finding]:
    """The first all-reduce, and the usual reason where it fails."""
    found = []
    failed = {host: m.error for host, m in meetings.items() if m.error}
    variable = "NCCL_SOCKET_IFNAME" if use_gpu else "GLOO_SOCKET_IFNAME"
    backend = "nccl" if use_gpu else "gloo"
    if failed:
        what = f"the all-reduce failed ({backend}): {next(iter(failed.values()))}"
        mend = (
            f"give the interface that faces the other hosts (--env {variable}=NAME), and open all "
            "ports between the hosts: ranks also meet at random ones"
        )
        found.append(error(several(list(failed)), what, "so would the first step", mend))
    wrong = [host for host, m in meetings.items() if m.wrong]
    if wrong:
        what = f"the all-reduce gave a wrong sum ({backend})"
        mend = "mend the interconnect's driver; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 narrow it"
        found.append(error(several(wrong), what, "gradients would be wrong", mend))
    nccl = {host: m.nccl for host, m in meetings.items() if m.nccl}
    if len(set(nccl.values())) > 1:
        what = "NCCL is " + ", ".join(f"{version} on {host}" for host, version in nccl.items())
        mend = "install the same torch on all hosts"
        found.append(error(several(list(nccl)), what, "NCCL of two versions may hang", mend))
    return found


def check_own_names(
    facts: Mapping[str, HostFacts], environment: Mapping[str, str]
) -> list[Finding]:
    """gloo tells others the address that a host's own name has: 127.0.1.1 helps nobody."""
    if len(facts) < 2 or environment.get("GLOO_SOCKET_IFNAME"):
        return []
    return [
        error(
            host,
            f"its own name means {its.address} there",
            "gloo would tell the other hosts to call that, and they would call themselves",
            "--env GLOO_SOCKET_IFNAME=NAME of the interface that faces them, or mend /etc/hosts",
        )
        for host, its in facts.items()
        if its.address.startswith("127.") and not its.gpus  # as Debian writes it into /etc/hosts
    ]
