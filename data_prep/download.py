"""One large file over HTTP: what was received stays, and the next request asks for the rest."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import IO, Any, NoReturn

from .errors import DataError

BLOCK_BYTES = 1 << 18
TIMEOUT_S = 60.0  # without a byte
ATTEMPTS = 8  # in a row that bring nothing new: two minutes
LONGEST_WAIT_S = 60.0
_PASSING_CODES = {408, 425, 429, 500, 502, 503, 504}


class _Lost(Exception):
    """The connection failed in a way that may pass; the text says how."""


def download(
    url: str,
    target: Path,
    size_bytes: int,
    md5: str,
    sleep: Callable[[float], object] = time.sleep,
    progress: bool = True,
) -> None:
    """Fetch a file; a `<target>.partial` that an earlier run left is gone on with.

    The partial file is hashed as it grows and gets its name when size and MD5 are right, so that a
    file of the target's name is whole if it exists. That the rest belongs to the same version of
    the file as the beginning, only the MD5 tells: servers' ETags differ between mirrors.

    Args:
        url: http, https or file.
        target: where the file goes; its folder exists.
        size_bytes: what the file must measure.
        md5: its MD5 in hexadecimal digits.
        sleep: waits so many seconds before the next attempt.
        progress: show a bar on stderr.

    Raises:
        DataError: the server hasn't the file, has another one, or can't be reached. What was
            received stays for the next run, but for bytes whose MD5 is wrong.
        OSError: the file can't be written.
    """
    from tqdm import tqdm

    partial = target.with_name(target.name + ".partial")
    bar = tqdm(
        total=size_bytes, desc=target.name, unit="B", unit_scale=True, delay=2, disable=not progress
    )
    with bar, partial.open("a+b") as file:
        part = _Part(url, file, size_bytes, bar)
        _receive_all(part, partial, sleep, progress)
        if part.digest.hexdigest() != md5:
            partial.unlink()
            raise DataError(
                f"{url}: the file has MD5 {part.digest.hexdigest()}, not {md5}, and was removed; "
                "run the command again, or give another --mirror."
            )
        os.fsync(file.fileno())
    os.rename(partial, target)


def check_file(path: Path, size_bytes: int, md5: str, progress: bool = True) -> None:
    """Hash a file that is there already.

    Raises:
        DataError: it isn't of this size and MD5.
    """
    from tqdm import tqdm

    mend = "remove it, or move it away, and fetch it again."
    if (found_bytes := path.stat().st_size) != size_bytes:
        raise DataError(f"{path}: is {found_bytes:,} bytes long, not {size_bytes:,}; {mend}")
    digest = _md5()
    bar = tqdm(
        total=size_bytes,
        desc=f"check {path.name}",
        unit="B",
        unit_scale=True,
        delay=2,
        disable=not progress,
    )
    with bar, path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != md5:
        raise DataError(f"{path}: has MD5 {digest.hexdigest()}, not {md5}; {mend}")


def _md5() -> hashlib._Hash:
    # Against damage, not against forgery: without the flag, FIPS machines refuse it.
    return hashlib.md5(usedforsecurity=False)


class _Part:
    """The file in the making and the digest of what it holds."""

    def __init__(self, url: str, file: IO[bytes], size_bytes: int, bar: Any):
        self.url, self.file, self.size_bytes, self.bar = url, file, size_bytes, bar
        self.digest, self.received = _md5(), 0
        if os.fstat(file.fileno()).st_size > size_bytes:
            self.restart()
        file.seek(0)
        while block := file.read(1 << 20):
            self._count(block)

    def append(self, block: bytes) -> None:
        if self.received + len(block) > self.size_bytes:
            _refuse_size(self.url, "more", self.size_bytes)
        self.file.write(block)
        self.file.flush()  # a kill leaves all that was received
        self._count(block)

    def restart(self) -> None:
        self.file.truncate(0)
        self.digest, self.received = _md5(), 0
        self.bar.reset()

    def _count(self, block: bytes) -> None:
        self.digest.update(block)
        self.received += len(block)
        self.bar.update(len(block))


def _receive_all(
    part: _Part, partial: Path, sleep: Callable[[float], object], progress: bool
) -> None:
    failures, furthest = 0, part.received
    while part.received < part.size_bytes:
        try:
            _receive(part)
        except _Lost as lost:
            if part.received > furthest:
                failures, furthest = 0, part.received
            failures += 1
            if failures == ATTEMPTS:
                raise DataError(
                    f"{part.url}: {lost}, {ATTEMPTS} times in a row; {partial} keeps "
                    f"{part.received:,} of {part.size_bytes:,} bytes: run the command again to go "
                    "on, or give another --mirror."
                ) from None
            wait_s = min(2.0 ** (failures - 1), LONGEST_WAIT_S)
            if progress:
                part.bar.write(f"{part.url}: {lost}; again in {wait_s:.0f} s", file=sys.stderr)
            sleep(wait_s)


def _receive(part: _Part) -> None:
    """One request, and what comes of its answer before it ends or breaks."""
    headers = {"User-Agent": "convnext-yolo"}
    if part.received:
        headers["Range"] = f"bytes={part.received}-"
    with _open(part, headers) as response:
        _check_answer(part, response.status, response.headers)
        while block := _next_block(response):
            part.append(block)
    if part.received < part.size_bytes:
        raise _Lost(f"the connection ended after {part.received:,} of {part.size_bytes:,} bytes")


def _open(part: _Part, headers: dict[str, str]) -> Any:
    try:
        request = urllib.request.Request(part.url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        said = f"the server answers {error.code} {' '.join(str(error.reason).split())}"
        if error.code == 416:  # it has nothing behind what we hold
            _refuse_size(part.url, f"at most {part.received:,}", part.size_bytes)
        if error.code in _PASSING_CODES:
            raise _Lost(said) from None
        raise DataError(f"{part.url}: {said}; check --mirror.") from None
    except (ValueError, http.client.InvalidURL) as error:  # a space, a port that is no number
        raise DataError(f"{part.url}: is no proper URL ({error}); check --mirror.") from None
    except (OSError, http.client.HTTPException) as error:
        if _will_not_pass(error) or part.url.startswith("file:"):
            raise DataError(f"{part.url}: {_reason(error)}; check --mirror.") from None
        raise _Lost(_reason(error)) from None


def _next_block(response: Any) -> bytes:
    try:
        block: bytes = response.read1(BLOCK_BYTES)  # what is there: read() waits for all of it
    except (OSError, http.client.HTTPException) as error:
        raise _Lost(_reason(error)) from None
    return block


def _check_answer(part: _Part, status: int | None, headers: Message) -> None:
    """Whether the body is what was asked for; a server that sends all instead of the rest may."""
    if status == 206:
        given = headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", given.strip())
        if not match or int(match[1]) != part.received:
            raise DataError(
                f"{part.url}: asked for the bytes from {part.received} on, the server answers "
                f"with Content-Range {given!r}; give another --mirror."
            )
        total = match[2]
    elif status in (200, None):  # None: a file's
        total = headers.get("Content-Length", "*")
    else:
        raise DataError(f"{part.url}: the server answers {status}; give another --mirror.")
    if total.isdecimal() and int(total) != part.size_bytes:
        _refuse_size(part.url, f"{int(total):,}", part.size_bytes)
    if status != 206 and part.received:
        part.restart()


def _refuse_size(url: str, found: str, size_bytes: int) -> NoReturn:
    raise DataError(
        f"{url}: the server's file has {found} bytes, not {size_bytes:,}; give another --mirror."
    )


def _will_not_pass(error: Exception) -> bool:
    cause = _cause(error)
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_NONAME  # there is no such host
    # A text is urllib's own: it didn't even try.
    return isinstance(cause, ssl.SSLCertVerificationError | str)


def _cause(error: Exception) -> BaseException | str:
    return error.reason if isinstance(error, urllib.error.URLError) else error


def _reason(error: Exception) -> str:
    cause = _cause(error)
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)
