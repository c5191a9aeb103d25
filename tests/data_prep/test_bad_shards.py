"""Shards that are no longer what was written: what `verify` says, and what reading them says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.reader import ShardReader
from convnext_yolo.data_prep.verify import verify

from .conftest import CocoFiles


def assert_sentence(text: str) -> None:
    assert "\n" not in text
    assert text.endswith(".")


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / "manifest.json").read_bytes())
        change(document)
        (folder / "manifest.json").write_text(json.dumps(document))

    return spoil


# how it is spoilt; what `verify` says; what reading all samples says, or nothing if they read well
SHARDS = {
    "truncated tar": (edit("shard-000001.tar", lambda d: d[:700]), "has 700 bytes", "000000000031"),
    "empty tar": (edit("shard-000001.tar", lambda d: b""), "has 0 bytes", "000000000031"),
    "flipped byte in a picture": (
        edit("shard-000001.tar", lambda d: d.replace(b"BM", b"BX", 1)),
        "sha256 is",
        "000000000031",
    ),
    "wrong hash": (
        manifest(lambda d: d["shards"][1].update(sha256="0" * 64)),
        "the manifest says 000000000000",
        "",
    ),
    "missing shard": (
        lambda folder: (folder / "shard-000001.tar").unlink(),
        "the shard is missing",
        "shard-000001.tar",
    ),
    "two shards swapped": (
        lambda folder: (
            (folder / "shard-000000.tar").rename(folder / "x"),
            (folder / "shard-000001.tar").rename(folder / "shard-000000.tar"),
            (folder / "x").rename(folder / "shard-000001.tar"),
        ),
        "sha256 is",
        "sample",
    ),
    "unlisted shard": (
        lambda folder: shutil.copy(folder / "shard-000001.tar", folder / "shard-000009.tar"),
        "doesn't list this shard",
        "",
    ),
    "wrong sample count": (
        manifest(lambda d: d["shards"][1].update(samples=3)),
        "the manifest is damaged",
        "the manifest is damaged",
    ),
    "manifest cut short": (
        edit("manifest.json", lambda d: d[:-9]),
        "not valid JSON",
        "not valid JSON",
    ),
    "no manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        "it has no manifest.json",
        "it has no manifest.json",
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_bad_shards(coco_files: CocoFiles, tmp_path: Path, name: str) -> None:
    spoil, verified, read = SHARDS[name]
    coco_files.shard(tmp_path / "out")
    spoil(tmp_path / "out")
    try:
        sentences = verify(tmp_path / "out", progress=False)
    except DataError as error:
        sentences = [str(error)]
    assert sentences
    assert verified in " ".join(sentences)
    for sentence in sentences:
        assert_sentence(sentence)

    def read_all() -> None:
        reader = ShardReader(tmp_path / "out")
        for position in range(len(reader)):
            reader.decode(position)

    if not read:
        read_all()
        return
    with pytest.raises(DataError, match=read):
        read_all()
