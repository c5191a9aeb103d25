"""The connection between the front process of a job and each of its ranks.

Launchers don't pass every signal on, some orphan their ranks, and DeepSpeed's ends those of other
jobs with its own. So the front speaks to its ranks itself: it listens, and beside each rank runs a
guard (`guard.py`) that calls it. Each line is a JSON object; both sides say something every
`BEAT_S`. Where nothing is heard for `LOST_S`, or the connection ends, the other side is gone.

The token keeps strangers and ranks of other jobs out; it is no secret on these hosts.

from a guard: hello (token, rank, host, pid), beat (count, step, doing, for_s, state), exit (code,
reason)
from the front: beat, signal (number), stacks, kill
"""

import json
import socket
from typing import Any

# Set for the ranks of a supervised job: HOST:PORT:TOKEN of the front, and the folder of logs.
FRONT = "CONVNEXT_YOLO_FRONT"
LOGS = "CONVNEXT_YOLO_LOGS"
JOB = "CONVNEXT_YOLO_JOB"  # the token, in the environment of a rank and of what it starts
BEAT_S = 2.0
LOST_S = 15.0
# From a request to stop to the end by force: a step, and the checkpoint that answers it.
STOP_S = 120.0
# The same for a rank whose job is lost: what it can still publish, it has.
GIVE_UP_S = 15.0


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
        except ValueError:
            raise ConnectionError("not JSON") from None
        if len(self._rest) > 65536 or not all(isinstance(m, dict) for m in messages):
            raise ConnectionError("not JSON lines")
        return messages
