"""The connection between the front process of a job and each of its ranks.

Launchers don't pass every signal on, some orphan their ranks, and DeepSpeed's ends those of other
jobs with its own. So the front speaks to its ranks itself: it listens, and beside each rank runs a
guard (`guard.py`) that calls it. Each line is a JSON object; both sides say something every
`BEAT_S`. Where nothing is heard for `LOST_S`, or the connection ends, the other side is gone.

Where each host is started by itself, each has a front, and host 0's judges the whole job: a guard
elsewhere reports to its own front and to that one. What the first front decides, the own front
hears from the guard.

The token keeps strangers and ranks of other jobs out; it is no secret on these hosts.

from a guard: hello (token, rank, host, pid), beat (count, step, doing, for_s, state, judged), exit
(code, reason, verdict); to the first front also: signal (number)
from the front: beat, signal (number), stacks, kill (verdict)
"""

import json
import socket
from dataclasses import dataclass
from typing import Any

# Set for the ranks of a supervised job: HOST:PORT:TOKEN of the front, and the folder of logs.
FRONT = "CONVNEXT_YOLO_FRONT"
FIRST = "CONVNEXT_YOLO_FIRST_FRONT"  # the same of host 0's front, where that is another
LOGS = "CONVNEXT_YOLO_LOGS"
JOB = "CONVNEXT_YOLO_JOB"  # the token, in the environment of a rank and of what it starts
BEAT_S = 2.0
LOST_S = 15.0
# From a request to stop to the end by force: a step, and the checkpoint that answers it.
STOP_S = 120.0
# The same for a rank whose job is lost: what it can still publish, it has.
GIVE_UP_S = 15.0
# From the first failure until the rest is ended: so long, others may tell theirs.
COLLECT_S = 10.0


@dataclass(frozen=True)
class Verdict:
    """What the first front says of the job."""

    code: int  # 0: each rank's own
    sentence: str
    stopped: bool = False  # by a signal


class Lines:
    """JSON lines over a socket."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Raises OSError where the other side is gone."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has come since; waits for something.

        Raises:
            OSError: the other side is gone, is no guard or front, or was silent for too long.
        """
        data = self.connection.recv(65536)
        if not data:
            raise ConnectionError("closed")
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise ConnectionError("not JSON") from None
        if len(self._rest) > 65536 or not all(isinstance(m, dict) for m in messages):
            raise ConnectionError("not JSON lines")
        return messages
