"""An output at a URL, such as `s3://bucket/shards`, through fsspec.

Shards are written in a scratch folder on this machine, uploaded one by one and removed there, so it
needs room for a few of them only. The manifest comes last: without it there is no output. The
journal stays in the scratch folder, so that a run that was ended goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from .errors import DataError
from .findings import REPORT_NAME, Report
from .journal import JOURNAL_NAME
from .manifest import MANIFEST_NAME, Manifest, ShardEntry
from .publish import MEND, OUR_FILES, keep_only, work_folder
from .records import ImageRecord


class RemoteOutput:
    """An output at any URL that fsspec knows.

    Args:
        url: of the folder.
        scratch: where shards are written first; None: the machine's folder for temporary files.

    Raises:
        DataError: no such protocol, or a package that it needs is not installed.
    """

    def __init__(self, url: str, scratch: Path | None = None):
        import fsspec

        self.name = re.sub(r"//[^/@]*@", "//", url)  # no password in a sentence
        try:
            self._store, root = fsspec.core.url_to_fs(url)
        # Stores that connect at once (ftp, sftp) fail here, each in its own way.
        except Exception as error:
            raise DataError(f"{self.name}: can't be opened ({error}); correct the URL.") from None
        self._root = root.rstrip("/")
        # The next run must find it again, and two outputs must not share it.
        name = "convnext-yolo-shard-" + hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
        self._scratch = Path(tempfile.gettempdir() if scratch is None else scratch) / name
        self._sizes: dict[str, int] = {}

    def existing(self) -> Manifest | None:
        """The manifest of an output that is there already.

        Raises:
            DataError: something else is there, or the manifest is damaged, or can't be read.
        """
        with self._speaking("read"):
            self._sizes = self._listed()
            if MANIFEST_NAME in self._sizes:
                data = self._store.cat_file(self._at(MANIFEST_NAME))
                return Manifest.parse(data, f"{self.name}/{MANIFEST_NAME}")
        strangers = [name for name in sorted(self._sizes) if not OUR_FILES.fullmatch(name)]
        if strangers:
            raise DataError(
                f"{self.name}: exists and is not a shard folder, it holds {strangers[0]!r}; {MEND}."
            )
        return None

    def report(self) -> Report:
        """The report of an output that is there already."""
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(Exception):  # it is a courtesy
                self._store.get_file(self._at(REPORT_NAME), str(Path(folder) / REPORT_NAME))
            return Report.load(Path(folder))

    def check(self, manifest: Manifest, images: Sequence[ImageRecord]) -> None:
        """See to it that an existing output is whole. Images are compared by their sizes only.

        Raises:
            DataError: a shard is missing or of another size.
        """
        for entry in manifest.shards:
            size = self._sizes.get(entry.name)
            if size != entry.bytes:
                what = "the shard is missing" if size is None else f"has {size} bytes"
                raise DataError(
                    f"{self.name}/{entry.name}: {what}, the manifest says {entry.bytes} bytes; "
                    f"{MEND}."
                )

    @contextlib.contextmanager
    def working(self) -> Iterator[Path]:
        """The scratch folder, locked; it is this user's alone, as its name can be guessed.

        Raises:
            DataError: somebody else's folder is there, or another run works there.
        """
        self._scratch.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self._scratch.mkdir(mode=0o700)
        if self._scratch.is_symlink() or self._scratch.stat().st_uid != os.getuid():
            raise DataError(f"{self._scratch}: is somebody else's; give your own with --scratch.")
        with work_folder(self._scratch) as folder:
            yield folder

    def prepare(self, folder: Path, shards: Collection[str], done: Collection[str]) -> None:
        """Clear the scratch folder but for the journal; what is done is in the store.

        Raises:
            DataError: the store holds shards of another, unfinished output.
        """
        keep_only(folder, {JOURNAL_NAME})
        for name in sorted(self._sizes):
            if name.endswith(".tar") and name not in shards:
                raise DataError(
                    f"{self.name}: holds {name} of an unfinished output with other settings; "
                    "remove it or give another output."
                )

    def has(self, folder: Path, entry: ShardEntry) -> bool:
        """Whether a shard that the journal notes is really there."""
        return self._sizes.get(entry.name) == entry.bytes

    def take(self, folder: Path, entry: ShardEntry) -> None:
        """Upload a shard that is done, and remove it from the scratch folder.

        Raises:
            DataError: it can't be uploaded, or arrived with another size.
        """
        self._upload(folder / entry.name)
        (folder / entry.name).unlink()

    def commit(self, folder: Path) -> None:
        """Every shard is there: the report and, last, the manifest make it an output."""
        self._upload(folder / REPORT_NAME)
        self._upload(folder / MANIFEST_NAME)
        shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, path: Path) -> None:
        with self._speaking("written"):
            self._store.makedirs(self._root, exist_ok=True)
            self._store.put_file(str(path), self._at(path.name))
            self._store.invalidate_cache()
            size = self._store.info(self._at(path.name))["size"]
        if size != path.stat().st_size:
            raise DataError(
                f"{self.name}/{path.name}: arrived with {size} bytes of {path.stat().st_size}; "
                "start again to go on from here."
            )

    def _listed(self) -> dict[str, int]:
        """The names in the folder and their sizes; folders have none."""
        self._store.invalidate_cache()
        try:
            entries = self._store.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        names = ((entry["name"].rstrip("/").rpartition("/")[2], entry) for entry in entries)
        own = self._root.rpartition("/")[2]  # object stores list a folder's marker in itself
        return {name: int(entry["size"] or 0) for name, entry in names if name != own}

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _speaking(self, verb: str) -> Iterator[None]:
        """Every store has exceptions of its own; all of them mean that it didn't work."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.name}: can't be {verb} ({type(error).__name__}: {error}); "
                "see to address, credentials and network, then start again to go on from here."
            ) from error
