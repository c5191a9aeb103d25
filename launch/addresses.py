"""Addresses and ports of this machine."""

import socket

from .job import LaunchError


def own_address(host: str, port: int = 9) -> str:
    """The address of this machine that a host sees when this one calls it. Nothing is sent.

    Raises:
        OSError: the host can't be found from here.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def address_for(callers: tuple[str, ...]) -> str:
    """The address of this machine by which those hosts can call it.

    Raises:
        LaunchError: none of them can be found.
    """
    found = []
    for host in callers:
        try:
            found.append(own_address(host.rpartition("@")[2]))
        except OSError:
            continue  # a name that only ssh knows
    far = [address for address in found if not address.startswith("127.") and address != "::1"]
    if far or found:
        return (far or found)[0]
    raise LaunchError(
        f"{', '.join(callers)}: none of these hosts can be found from here; give the first one's "
        "address with --master-addr"
    )


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
