"""Who calls a front: the guards of its ranks, and strangers."""

import hmac
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..addresses import address_for
from ..command import FirstHost, Ranks
from .lifeline import Lines
from .rank import Rank

Message = dict[str, Any]
GONE: Message = {"type": "gone"}  # a guard's last word, if it did not say any


class Callers:
    """The connections of guards, and what they say.

    Args:
        expected: the ranks of the launcher that the front starts.
        token: by which their guards are known.

    Raises:
        LaunchError: no host that must call finds this one.
    """

    def __init__(self, expected: Ranks, token: str):
        self.expected, self.token = expected, token
        self.ranks: list[Rank] = []
        self._selector = selectors.DefaultSelector()
        address = address_for(expected.callers)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family)
        self.address = f"{address}:{listener.getsockname()[1]}"
        self._listeners = [listener]
        self._job_token = ""
        first = expected.first_host
        if first and first.is_this:
            self._listeners += _listen_to_all(first)
            self._job_token = first.token
        for one in self._listeners:
            self._selector.register(one, selectors.EVENT_READ, None)

    def close(self) -> None:
        """Hangs up on everyone."""
        self._selector.close()
        for listener in self._listeners:
            listener.close()
        for rank in self.ranks:
            if rank.lines:
                rank.lines.connection.close()

    def hear(self, timeout_s: float) -> Iterator[tuple[Rank, Message]]:
        """What the ranks' guards have said; waits for something until then."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                try:
                    connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                except OSError:  # the caller has gone again, or there are too many
                    continue
                connection.settimeout(2)
                caller = _Caller(Lines(connection))  # who it is, it says when it likes
                self._selector.register(connection, selectors.EVENT_READ, caller)
            else:
                yield from self._receive(key.data)

    def _receive(self, caller: "_Caller") -> Iterator[tuple[Rank, Message]]:
        now = time.monotonic()
        try:
            for message in caller.lines.receive():
                if caller.rank is None:
                    caller.rank = self._welcome(caller.lines, message, now)
                else:
                    caller.rank.take(message, now)
                yield caller.rank, message
        except (OSError, KeyError, TypeError, ValueError, OverflowError):
            self._selector.unregister(caller.lines.connection)
            if caller.rank is None:  # a stranger
                caller.lines.connection.close()
            else:
                yield caller.rank, GONE

    def _welcome(self, lines: Lines, hello: Message, now: float) -> Rank:
        """A rank, by its guard's first words.

        Raises:
            ConnectionError, KeyError, ValueError: it is none of ours.
        """
        token = str(hello["token"])
        is_own = hmac.compare_digest(token, self.token)
        if not is_own and not (self._job_token and hmac.compare_digest(token, self._job_token)):
            raise ConnectionError("not one of ours")
        number = int(hello["rank"])
        if not is_own and any(rank.number == number for rank in self.ranks):
            raise ConnectionError("another start of its host's, too early for the next of ours")
        host = self.expected.hosts.get(number, str(hello["host"]))
        rank = Rank(number, host, lines, now, is_own=is_own)
        rank.place.since_s = now
        self.ranks.append(rank)
        rank.send(type="beat")  # so it knows that it was heard
        return rank


def _listen_to_all(first: FirstHost) -> list[socket.socket]:
    """Listens on all addresses, as the hosts of the job may call any; nothing if it can't be."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return [socket.create_server(("", first.port), family=family, dualstack_ipv6=dual)]
    except OSError as error:
        print(
            f"convnext-yolo: port {first.port}: {error.strerror}; so each host supervises its own "
            "ranks alone; give another master port to mend that",
            file=sys.stderr,
        )
        return []


@dataclass
class _Caller:
    """A connection, and the rank that it turned out to be."""

    lines: Lines
    rank: Rank | None = None
