"""Files in a folder at a URL: byte ranges through fsspec, with patience for a host that is away.

Every failure is one of four: the file is not there, the host refuses us, the answer is no answer
to the question (all three end at once, in a sentence), or the host can't be reached or is
overloaded. For the last, requests are repeated with growing pauses until the patience is over.
"""

import errno
import multiprocessing
import os
import re
import socket
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from .errors import AwayError, DataError

# scheme: the package that fsspec wants for it
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
REQUEST_S = 30.0  # without a byte of an answer, a request has failed
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
SILENT_S = 1.0  # a hiccup is not worth a line
# Whose exceptions are those of a network. The two after aiohttp: time-outs, before Python 3.11.
_LIBRARIES = {"aiohttp", "asyncio", "fsspec"}
_LIBRARIES |= {"aiobotocore", "botocore", "gcsfs", "google", "requests", "urllib3"}
_DENIED, _ABSENT, _OVERLOADED = (401, 403, 407), (404, 410), (408, 425, 429)
# File systems made by the process that this one was forked from. Let go, they would close their
# connections, which are that process's too, through an event loop that does not run here.
_inherited: list[Any] = []


def is_url(location: Path | str) -> bool:
    """Whether shards lie at a URL rather than in a folder."""
    return isinstance(location, str) and "://" in location


class RemoteFolder:
    """Reads files, or parts of them, from a folder at a URL.

    Cheap to make and to pickle: it connects at the first read, in the process that reads.

    Args:
        url: http, https, s3 or gs. Credentials are found where the libraries look for them.
        patience_s: how long a host may stay away before the reading gives up.
        known_host: a name that does not resolve is an outage, not a mistake.
        connect: makes the fsspec file system.
        clock, sleep: of the waiting.

    Raises:
        DataError: a scheme that can't be read.
    """

    def __init__(
        self,
        url: str,
        patience_s: float,
        known_host: bool = False,
        connect: Callable[[str, float], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.url, self.patience_s, self.known_host = url, patience_s, known_host
        self._connect, self._clock, self._sleep = connect or _connect, clock, sleep
        parts = urlsplit(url)
        self.scheme = parts.scheme
        self.host = parts.netloc.rpartition("@")[2]  # without a password
        if self.scheme not in PACKAGES or not self.host:
            raise DataError(
                f"{self.shown()}: shards are read from folders and from http://, https://, s3:// "
                "and gs:// URLs; give one of these"
            )
        if self.scheme not in ("http", "https"):
            self.host = f"{self.scheme}://{self.host}"
        self._filesystem: Any = None
        self._owner = os.getpid()  # of the file system

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystem": None}

    def shown(self, name: str = "") -> str:
        """The URL of a file for a sentence: without password and query, which may be a key."""
        parts = urlsplit(self.url)
        path = "/".join(filter(None, (parts.path.rstrip("/"), name)))
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, "", ""))

    def read(
        self, name: str, start: int | None = None, end: int | None = None, mend: str = ""
    ) -> bytes:
        """A file, or its bytes from `start` to `end`, fewer where it is shorter.

        Args:
            name: of the file in the folder.
            start, end: of the part.
            mend: what to do about a file that is not there.

        Raises:
            DataError: it is not there, the host refuses, or never answered.
            AwayError: the host has answered once, and then stayed away too long.
        """
        first_failure_s: float | None = None
        attempt, told = 0, False
        while True:
            began_s = self._clock()
            try:
                content: bytes = self._connected().cat_file(self._path(name), start=start, end=end)
            except DataError:
                raise
            except Exception as error:
                if start is not None and _is_beyond_the_end(error):
                    return b""
                self._refuse(error, name, mend)
                why = _reason(error)
            else:
                self.known_host = True
                if told:
                    _say(f"{self.host} answers again")
                return content
            first_failure_s = began_s if first_failure_s is None else first_failure_s
            away_s = self._clock() - first_failure_s
            if away_s >= self.patience_s:
                raise (AwayError if self.known_host else DataError)(
                    f"{self.host} has not answered for {self.patience_s:g} s ({why}); see that it "
                    "is up and can be reached from here, then start again, or have more patience "
                    "with data.patience_s (of `eval`: --patience-s)"
                )
            pause_s = _pause_s(attempt, f"{name} {start}")
            if not told and away_s + pause_s >= min(SILENT_S, self.patience_s):
                told = True
                _say(f"waiting for {self.host} up to {self.patience_s:g} s ({why})")
            self._sleep(min(pause_s, self.patience_s - away_s))
            _end_with_the_rank()
            attempt += 1

    def _connected(self) -> Any:
        if self._filesystem is not None and self._owner != os.getpid():
            _inherited.append(self._filesystem)
            self._filesystem = None
        if self._filesystem is None:
            request_s = min(REQUEST_S, max(1.0, self.patience_s))
            try:
                self._filesystem = self._connect(self.scheme, request_s)
            except ImportError:
                package = PACKAGES[self.scheme]
                raise DataError(
                    f"{self.shown()}: {self.scheme}:// is read with {package}, which is not "
                    f"installed; `pip install {package}`"
                ) from None
            self._owner = os.getpid()
        return self._filesystem

    def _path(self, name: str) -> str:
        if self.scheme not in ("http", "https"):
            return f"{self.url.rstrip('/')}/{name}"
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def _refuse(self, error: Exception, name: str, mend: str) -> None:
        """Raises for an answer that waiting does not change; returns where it may."""
        status, kind = _status(error), type(error).__name__
        where, why = self.shown(name), _reason(error)
        if isinstance(error, FileNotFoundError) or status in _ABSENT:
            raise DataError(f"{where}: {self.host} has no such file; {mend}") from None
        if isinstance(error, PermissionError) or status in _DENIED or "Credential" in kind:
            what = {
                "s3": "give AWS credentials that may read it, or FSSPEC_S3_ANON=true if all may",
                "gs": "give Google credentials that may read it",
            }.get(self.scheme, "make it readable, or give user:password@ in the URL")
            raise DataError(f"{where}: {self.host} denies access ({why}); {what}") from None
        if not self.known_host and _name_is_unknown(error):
            raise DataError(
                f"{where}: the host {self.host} is not known; mend the URL or the name service"
            ) from None
        overloaded = status is not None and (status in _OVERLOADED or status >= 500)
        refused = (
            (status is not None and not overloaded)
            or "Certificate" in kind
            or "Validation" in kind
            or getattr(error, "errno", None) in (errno.EINVAL, errno.EPERM)
        )
        if refused or isinstance(error, ValueError):
            raise DataError(f"{where}: can't be read ({why}); mend the URL or the host") from None
        libraries = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
        if not isinstance(error, OSError) and libraries.isdisjoint(_LIBRARIES):
            raise error


def _connect(scheme: str, request_s: float) -> Any:
    """The fsspec file system of a scheme. Repeating is ours, so the libraries' own is turned off.

    A fsspec configuration (FSSPEC_S3_… in the environment, or its files) has the last word.
    """
    import fsspec

    options: dict[str, dict[str, Any]] = {}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=request_s, sock_read=request_s)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        options["headers"] = {"Accept-Encoding": "identity"}  # a range is of the bytes themselves
    elif scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": request_s,
            "read_timeout": request_s,
            "retries": {"total_max_attempts": 1},
        }
    configured = fsspec.config.conf.get(scheme, {})
    merged = {key: {**ours, **configured.get(key, {})} for key, ours in options.items()}
    # Not one of fsspec's shared instances: those do not survive a fork.
    filesystem = fsspec.filesystem(scheme, skip_instance_cache=True, **merged)
    if scheme == "s3":
        filesystem.retries = 1
    return filesystem


def _pause_s(attempt: int, what: str) -> float:
    """Doubles each time, and is spread by what is asked for: many readers must not come at once.

    The spread is no random number, as those are the training's.
    """
    spread = zlib.crc32(f"{what} {attempt}".encode()) / 2**32
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempt, 30)) * (0.5 + spread / 2)


def _status(error: Exception) -> int | None:
    """The HTTP status of an error; aiohttp and gcsfs have their own names for it."""
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and value >= 400:
            return value
    return None


def _reason(error: Exception) -> str:
    """What an error says, without passwords, and without queries, which may be keys."""
    text = str(error).strip().partition("\n")[0]
    text = re.sub(r"://[^/\s@]*@", "://", text)
    text = re.sub(r"\?[^\s'\")]+", "?…", text)
    kind = type(error).__name__
    return f"{kind}: {text[:100]}" if text else kind


def _is_beyond_the_end(error: Exception) -> bool:
    """The host says that the file is shorter than the part that was asked for."""
    of_s3 = getattr(error, "errno", None) == errno.EINVAL and "range" in str(error)
    return _status(error) == 416 or of_s3


def _name_is_unknown(error: Exception) -> bool:
    cause = getattr(error, "os_error", error)
    return isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME


def _end_with_the_rank() -> None:
    """A loader process must not wait on when nobody waits for it any more."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
