"""`verify`: every kind of damage is named, whatever the number of processes."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.verify import verify


@pytest.fixture
def shards(coco_files, tmp_path) -> Path:
    """Five samples in three shards."""
    coco_files.shard(tmp_path / "shards")
    return tmp_path / "shards"


def rewrite(shards: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    """Write the first shard anew, with each member (name, content) changed or left out."""
    path = shards / "shard-000000.tar"
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old.getmembers():
            content = old.extractfile(member)
            assert content is not None
            changed = change(member.name, content.read())
            if changed is not None:
                info = tarfile.TarInfo(changed[0])
                info.size = len(changed[1])
                new.addfile(info, io.BytesIO(changed[1]))
    path.write_bytes(buffer.getvalue())


def edit_json(**values: Any) -> Callable[[Path], None]:
    def edit(name: str, content: bytes) -> tuple[str, bytes]:
        if name == "000000000012.json":
            content = json.dumps({**json.loads(content), **values}).encode()
        return name, content

    return lambda shards: rewrite(shards, edit)


def flip_a_bit(shards: Path) -> None:
    data = bytearray((shards / "shard-000001.tar").read_bytes())
    data[1000] ^= 1
    (shards / "shard-000001.tar").write_bytes(data)


def cut_in_half(shards: Path) -> None:
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])


def count_more_boxes(shards: Path) -> None:
    path = shards / "manifest.json"
    path.write_text(path.read_text().replace('"boxes": 5', '"boxes": 6'))


def make_it_a_folder(shards: Path) -> None:
    (shards / "shard-000001.tar").unlink()
    (shards / "shard-000001.tar").mkdir()


def repeat_an_image(shards: Path) -> None:
    path = shards / "manifest.json"
    path.write_text(path.read_text().replace("000000000031", "000000000000"))


def change_a_digest(shards: Path) -> None:
    path = shards / "manifest.json"
    document = json.loads(path.read_text())
    document["shards"][1]["chunks"] = ["0" * 16]
    path.write_text(json.dumps(document))


DAMAGE = {
    "flipped bit": (flip_a_bit, ["shard-000001.tar: sha256 is", "bytes 0 to 10240, samples 0000"]),
    "cut": (cut_in_half, ["has 3000 bytes", "sha256 is", "1 samples can be read"]),
    "empty": (lambda s: (s / "shard-000001.tar").write_bytes(b""), ["has 0 bytes", "broken"]),
    "missing": (lambda s: (s / "shard-000001.tar").unlink(), ["shard-000001.tar: the shard is mi"]),
    "extra": (
        lambda s: (s / "shard-000009.tar").write_bytes(b""),
        ["shard-000009.tar: the manifest doesn't list this shard"],
    ),
    "sample missing": (
        lambda s: rewrite(s, lambda n, c: None if n.startswith("000000000000") else (n, c)),
        ["holds 000000000012 at byte 0, the manifest says 000000000000 at 0", "1 samples can be"],
    ),
    "sample renamed": (
        lambda s: rewrite(s, lambda n, c: (n.replace("12.", "13."), c)),
        ["holds 000000000013 at byte"],
    ),
    "json missing": (
        lambda s: rewrite(s, lambda n, c: None if n == "000000000012.json" else (n, c)),
        ["sample 000000000012 has the members ['jpg']"],
    ),
    "json broken": (
        lambda s: rewrite(s, lambda n, c: (n, b"{" if n.endswith("json") else c)),
        ["sample 000000000000 has broken JSON", "sample 000000000012 has broken JSON"],
    ),
    "json no object": (
        lambda s: rewrite(s, lambda n, c: (n, b"3" if n.endswith("json") else c)),
        ["has broken JSON"],
    ),
    "image empty": (
        lambda s: rewrite(s, lambda n, c: (n, b"" if n.endswith("jpg") else c)),
        ["sample 000000000012 has an empty image"],
    ),
    "member twice": (
        lambda s: rewrite(s, lambda n, c: (n.replace("12.jpg", "12.json"), c)),
        ["the tar is broken after 1 samples (the member 000000000012.json comes twice)"],
    ),
    "json of another image": (edit_json(image_id=5), ["image_id 5 in its JSON, the manifest s"]),
    "json of another size": (edit_json(width=5), ["width 5 in its JSON, the manifest says 32"]),
    "json lacks a field": (edit_json(labels=None), ["has broken JSON"]),
    "json counts differ": (edit_json(crowd=[]), ["has 0 crowd for 1 labels"]),
    "json label unknown": (edit_json(labels=[2]), ["has labels outside the 2 classes"]),
    "json box outside": (edit_json(boxes=[[0, 0, 33, 4]]), ["has the box [0.0, 0.0, 33.0, 4.0]"]),
    "json box nan": (edit_json(boxes=[[0, 0, float("nan"), 4]]), ["has the box [0.0, 0.0, nan"]),
    "json area nan": (edit_json(area=[float("nan")]), ["has an area that is no number"]),
    "chunk digest wrong": (change_a_digest, ["its sha256 is the manifest's, but a chunk's is not"]),
    "name unprintable": (
        lambda s: rewrite(s, lambda n, c: (n.replace("12.", "\n12."), c)),
        ["holds '0000000000\\n12' at byte"],
    ),
    "a folder": (make_it_a_folder, ["shard-000001.tar: can't be read (Is a directory)"]),
    "boxes miscounted": (count_more_boxes, ["boxes is 6 but the shards hold 5"]),
    "image twice": (repeat_an_image, ["an image is in two samples"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_names_the_damage(shards, case):
    damage, parts = DAMAGE[case]
    damage(shards)
    problems = verify(shards, progress=False)
    for part in parts:
        assert any(part in problem for problem in problems), problems
    for problem in problems:
        assert "\n" not in problem
        assert problem.endswith(".")
        assert str(shards) in problem
    # Every shard but the damaged one is found good.
    assert not any("shard-000002.tar" in problem for problem in problems)


def test_verify_passes_good_shards(shards, capsys):
    assert verify(shards) == []
    assert capsys.readouterr().err == ""  # a bar is for what takes longer


def test_verify_does_not_repeat_itself_for_every_sample(coco_files, tmp_path):
    folder = tmp_path / "one"
    coco_files.shard(folder, samples_per_shard=5)
    path = folder / "shard-000000.tar"
    path.write_bytes(shifted(path))
    problems = verify(folder, progress=False)
    assert len(problems) == 6
    assert problems[-1].endswith("more problems like these.")


def shifted(path: Path) -> bytes:
    """The tar with one more member before all others."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("stray.txt"))
    return buffer.getvalue()[:512] + path.read_bytes()


def test_other_files_are_left_alone(shards):
    (shards / "report.json").write_text("{}")
    assert verify(shards, progress=False) == []


# --- pictures ------------------------------------------------------------------------------------


def overwrite(shards: Path, member: str, content: bytes) -> None:
    """Put other content of the same length into the first shard: only digests tell."""
    path = shards / "shard-000000.tar"
    with tarfile.open(path) as tar:
        info = tar.getmember(member)
    data = bytearray(path.read_bytes())
    data[info.offset_data : info.offset_data + info.size] = content.ljust(info.size, b"\0")
    path.write_bytes(data)


def test_pictures_are_decoded_if_asked_for(shards):
    assert verify(shards, images=True, progress=False) == []
    overwrite(shards, "000000000000.webp", b"RIFF")
    other = io.BytesIO()
    Image.new("RGB", (31, 48)).save(other, "JPEG")
    overwrite(shards, "000000000012.jpg", other.getvalue())
    (digest,) = verify(shards, progress=False)
    assert "shard-000000.tar: sha256 is" in digest
    first, *pictures = verify(shards, images=True, progress=False)
    assert first == digest
    again = "; fetch or make the shard again."
    assert [picture.partition("shard-000000.tar: ")[2] for picture in pictures] == [
        f"sample 000000000000 holds a picture that can't be decoded{again}",
        "sample 000000000012 holds a picture of 31x48 pixels, the manifest says 32x48" + again,
    ]


# --- processes -----------------------------------------------------------------------------------


def spoil_some(shards: Path) -> None:
    flip_a_bit(shards)
    (shards / "shard-000002.tar").unlink()
    edit_json(image_id=5)(shards)


@pytest.mark.process
def test_workers_do_not_change_the_answer(shards):
    assert verify(shards, workers=2, images=True) == []
    spoil_some(shards)
    expected = verify(shards, workers=1, images=True, progress=False)
    assert [p for i in range(3) for p in expected if f"shard-00000{i}" in p] == expected
    for workers in (2, 16):
        assert verify(shards, workers=workers, images=True, progress=False) == expected


@pytest.fixture
def endless(shards) -> Path:
    """The first shard never comes to its end: a pipe that nobody writes to."""
    (shards / "shard-000000.tar").unlink()
    os.mkfifo(shards / "shard-000000.tar")
    return shards


@pytest.mark.process
def test_an_interruption_ends_the_workers_at_once(endless, monkeypatch):
    def interrupt(self: object, count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        verify(endless, workers=2)
    assert not multiprocessing.active_children()


@pytest.mark.process
def test_a_killed_worker_is_one_sentence(endless, monkeypatch):
    def kill(self: object, count: int) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)

    monkeypatch.setattr("tqdm.tqdm.update", kill)
    with pytest.raises(DataError, match="A process that read shards was killed"):
        verify(endless, workers=2)
    assert not multiprocessing.active_children()
