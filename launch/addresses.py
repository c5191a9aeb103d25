"""Addresses and ports of this machine."""

import socket


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


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
