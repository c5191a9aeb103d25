"""Checkpoints: whole or not there, and never believed without their hashes."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convnext_yolo.recipes import checkpoint_writer, retention
from convnext_yolo.recipes.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    published,
)
from convnext_yolo.recipes.checkpoint_writer import CheckpointWriter, Entry


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def entries(seed: int = 0) -> list[Entry]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model/weight": torch.randn(3, 5, generator=generator),
        "model/count": torch.tensor(7),
        "ema/weight": torch.randn(3, 5, generator=generator),
    }
    return [
        Entry(name, tensor.nbytes, functools.partial(Tensor.clone, tensor))
        for name, tensor in tensors.items()
    ]


def save(folder: Path, step: int, keep: int = 5, ap: float | None = None) -> Path:
    state: dict[str, Any] = {"note": f"at {step}"}
    if ap is not None:
        state |= {"evaluated_step": step, "metrics": {"AP": ap}}
    writer = CheckpointWriter(folder, keep, keep_best=True)
    writer.begin(step, entries(step), state)
    path = writer.finish()
    writer.retention.clean()  # or what is deleted in the background may be seen yet
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path.name == "step-00000012" and (tmp_path / "latest").read_text() == path.name
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.state) == (12, {"note": "at 12"})
    for entry in entries(12):
        assert torch.equal(loaded.tensors[entry.name], entry.get())
    assert set(loaded.section("model")) == {"weight", "count"}
    assert not list(tmp_path.glob("*.partial"))


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name[-2:] for path in published(tmp_path)] == ["04", "03"]


def test_a_branch_that_was_left_is_set_aside_and_the_new_one_kept(tmp_path: Path) -> None:
    """Before anything else tells of the new one: the next `--resume auto` is to take the same."""
    save(tmp_path, 20)
    flip(save(tmp_path, 30) / "part-00000.safetensors")
    (tmp_path / "step-x").mkdir()  # not ours
    (tmp_path / "step-00000028.partial").mkdir()  # of a killed run
    (tmp_path / "best").write_text("step-00000030")
    retention.Retention(tmp_path, 1, True).leave(20)
    assert find_checkpoint(tmp_path, "auto").step == 20  # type: ignore[union-attr]
    assert (tmp_path / "latest").read_text() == "step-00000020"
    assert not (tmp_path / "best").exists()  # 20 has no evaluation
    save(tmp_path, 25, keep=1)
    assert [path.name for path in published(tmp_path)] == ["step-00000025"]
    assert find_checkpoint(tmp_path, "auto").step == 25  # type: ignore[union-attr]
    assert sorted(path.name for path in tmp_path.glob("*step*")) == [
        "set-aside-step-00000030",
        "step-00000025",
        "step-x",
    ]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped byte": (flip, "part-00000.safetensors is damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
    "missing part": (Path.unlink, "part-00000.safetensors is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_used(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage, words = DAMAGE[case]
    damage(newest / "part-00000.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(newest)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    error = capsys.readouterr().err
    assert str(newest) in error and words in error


def test_a_manifest_that_was_changed(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": 9'))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", '{"format": "else"}'])
def test_manifests_that_are_none(manifest: str | None, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    if manifest is None:
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=str(path)):
        load_checkpoint(path)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("point", ["_write_part", "write_synced", "sync_folder"])
def test_a_full_disk_fails_the_checkpoint_and_nothing_else(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread or while publishing: one sentence, no partial folder, the last one stays."""
    save(tmp_path, 1)

    def die(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_writer, point, die)
        with pytest.raises(CheckpointError, match=r"step 2: can't be written .*No space left"):
            save(tmp_path, 2)
    assert not list(tmp_path.glob("*.partial"))
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step in (1, 2)  # 2 if only its pointer had no room
    save(tmp_path, 3)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 3


class Killed(BaseException):
    """Nothing is done after it, as after SIGKILL."""


class Inline:
    """A thread that has done its work when it is started: so a kill hits that as well."""

    def __init__(self, target: Callable[..., None], args: Sequence[Any]):
        self.start = functools.partial(target, *args)

    def join(self) -> None:
        pass


class Point:
    """A call that changes the disk, by its number; whoever makes it dies before."""

    def __init__(self, number: int, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.number, self.folder, self.monkeypatch = number, folder, monkeypatch
        self.was_reached = False

    @contextmanager
    def kill(self) -> Iterator[None]:
        calls = itertools.count()

        def dies(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any, **options: Any) -> Any:
                if next(calls) == self.number:
                    raise Killed
                return call(*arguments, **options)

            return called

        with self.monkeypatch.context() as patched:
            patched.setattr(retention, "threading", SimpleNamespace(Thread=Inline))
            for place, name in (
                *((Path, name) for name in ("rename", "replace", "mkdir", "unlink")),
                *((checkpoint_writer, name) for name in ("sync_folder", "write_synced")),
                *((retention, name) for name in ("sync_folder", "write_synced", "_remove")),
            ):
                patched.setattr(place, name, dies(getattr(place, name)))
            try:
                yield
            except Killed:
                self.was_reached = True


def at_every_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Point]:
    """The points, each with a folder of its own, until one is not reached."""
    for number in itertools.count():
        point = Point(number, folder / f"point-{number}", monkeypatch)
        point.folder.mkdir()
        yield point
        if not point.was_reached:
            assert number >= 10
            return


def test_a_step_that_is_published_again_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an evaluation that was broken off; where it is the only one, too."""
    for point in at_every_point(tmp_path, monkeypatch):
        save(point.folder, 2)
        with point.kill():
            save(point.folder, 2)
        found = newest_checkpoint(point.folder)
        assert found is not None and found.step == 2
        assert len(found.tensors) == len(entries(2))
        again = find_checkpoint(point.folder, "auto")
        assert again is not None and again.step == 2
        assert save(point.folder, 2).name == "step-00000002"
        assert sorted(path.name for path in point.folder.iterdir()) == ["latest", "step-00000002"]


def test_while_old_ones_are_retired_a_good_one_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one stays, whatever its age, and what a kill has left goes with the next one."""
    for point in at_every_point(tmp_path, monkeypatch):
        save(point.folder, 1, keep=2, ap=0.5)
        save(point.folder, 2, keep=2, ap=0.3)
        with point.kill():
            save(point.folder, 3, keep=1, ap=0.1)
        found = find_checkpoint(point.folder, "auto")
        assert found is not None and found.step in (2, 3)
        best = (point.folder / "best").read_text()
        assert load_checkpoint(point.folder / best).step == 1
        save(point.folder, 4, keep=1, ap=0.2)
        names = sorted(path.name for path in point.folder.iterdir())
        assert names == ["best", "latest", "step-00000001", "step-00000004"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="step 1: can't be written"):
        save(tmp_path / "checkpoints", 1)


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    for step, ap in ((1, 0.1), (2, 0.5), (3, 0.2), (4, None), (5, 0.3)):
        save(tmp_path, step, keep=2, ap=ap)
    assert [path.name[-2:] for path in published(tmp_path)] == ["05", "04", "02"]
    assert (tmp_path / "best").read_text() == "step-00000002"
    save(tmp_path, 6, keep=2, ap=0.6)
    assert [path.name[-2:] for path in published(tmp_path)] == ["06", "05"]


def test_writing_goes_on_beside_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is what was there at `begin`, and it counts only after `finish`."""
    gate = threading.Event()
    write_part = checkpoint_writer._write_part

    def wait_and_write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert gate.wait(timeout=60)
        return write_part(path, tensors)

    monkeypatch.setattr(checkpoint_writer, "_write_part", wait_and_write)
    weight = torch.ones(4)
    writer = CheckpointWriter(tmp_path, keep=2, keep_best=False)
    assert not writer.is_pending and not writer.is_written
    writer.begin(1, [Entry("model/weight", weight.nbytes, lambda: weight)], {})
    weight.zero_()  # the next step
    assert writer.is_pending and not writer.is_written and not published(tmp_path)
    gate.set()
    assert load_checkpoint(writer.finish()).tensors["model/weight"].tolist() == [1, 1, 1, 1]
    assert not writer.is_pending


def split_in_two(folder: Path, pieces: list[tuple[int, Tensor]]) -> Path:
    """A checkpoint of one tensor of 3 × 5, of which only these pieces are written."""
    writer = CheckpointWriter(folder, keep=2, keep_best=False)
    entries = [
        Entry("model/w", piece.nbytes, functools.partial(Tensor.clone, piece), start, (3, 5))
        for start, piece in pieces
    ]
    writer.begin(1, [*entries, Entry("model/b", 4, lambda: torch.ones(1))], {})
    return writer.finish()


def test_pieces_are_joined_by_name(tmp_path: Path) -> None:
    whole = torch.arange(15.0)
    path = split_in_two(tmp_path, [(7, whole[7:]), (0, whole[:7])])
    tensors = load_checkpoint(path).section("model")
    assert tensors["w"].equal(whole.view(3, 5)) and tensors["b"].tolist() == [1]


def test_a_missing_piece_is_noticed(tmp_path: Path) -> None:
    path = split_in_two(tmp_path, [(0, torch.ones(7))])
    with pytest.raises(CheckpointError, match="has not all pieces of model/w"):
        load_checkpoint(path).section("model")


def test_a_second_checkpoint_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    """As after an evaluation that was broken off, and made up for."""
    save(tmp_path, 2)
    path = save(tmp_path, 2, ap=0.5)
    assert load_checkpoint(path).state["metrics"] == {"AP": 0.5}
    assert not list(tmp_path.glob("set-aside-*"))


def test_which_one_a_run_goes_on_from(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "auto") is None
    assert find_checkpoint(tmp_path, "never") is None
    first, _ = save(tmp_path, 1), save(tmp_path, 2)
    assert find_checkpoint(tmp_path, "auto").step == 2  # type: ignore[union-attr]
    assert find_checkpoint(tmp_path, str(first)).step == 1  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="--resume never"):
        find_checkpoint(tmp_path, "never")
    with pytest.raises(CheckpointError, match="absent"):
        find_checkpoint(tmp_path, str(tmp_path / "absent"))
    for path in published(tmp_path):
        flip(path / "part-00000.safetensors")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        find_checkpoint(tmp_path, "auto")


@given(sizes=st.lists(st.integers(0, 3 * checkpoint_writer.PART_BYTES // 2), max_size=40))
def test_parts_hold_everything_once_in_order(sizes: list[int]) -> None:
    all_entries = [Entry(f"t{i}", size, torch.Tensor) for i, size in enumerate(sizes)]
    parts = checkpoint_writer._parts(all_entries)
    assert [entry for part in parts for entry in part] == all_entries
    for part in parts:
        total = sum(entry.bytes for entry in part)
        assert part and (total <= checkpoint_writer.PART_BYTES or len(part) == 1)


def test_the_manifest_names_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "PART_BYTES", 70)
    path = save(tmp_path, 3)
    parts = json.loads((path / "manifest.json").read_text())["parts"]
    assert sorted(parts) == ["part-00000.safetensors", "part-00001.safetensors"]
    assert all((path / name).stat().st_size == part["bytes"] for name, part in parts.items())
    assert set(load_checkpoint(path).tensors) == {entry.name for entry in entries()}
