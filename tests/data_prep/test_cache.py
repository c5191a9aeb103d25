"""The chunks on the local disk: bounded, shared, and nobody else's files touched."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.cache import ChunkCache, used_bytes

FOLDER = f"{0:016x}/shard-000000.tar"


def name(number: int) -> str:
    return f"{FOLDER}/{number}-{number:016x}"


def stored(folder: Path) -> dict[int, int]:
    """Bytes by chunk."""
    files = (folder / "chunks" / FOLDER).glob("*")
    return {int(path.name.partition("-")[0]): path.stat().st_size for path in files}


def is_there(cache: ChunkCache, number: int, size: int) -> bool:
    file = cache.open(name(number), size)
    if file is not None:
        with file:
            assert file.read() == bytes([number]) * size
    return file is not None


@settings(deadline=None, max_examples=60)
@given(
    bound=st.integers(1, 4000),
    # (chunk, its bytes where it has to be fetched)
    uses=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 1500)), max_size=60),
)
def test_the_bound_holds_and_what_was_used_last_stays(bound, uses):
    with tempfile.TemporaryDirectory() as folder:
        cache = ChunkCache(Path(folder), bound, itertools.count(1).__next__)
        sizes: dict[int, int] = {}
        recent: list[int] = []  # the last used one at the end
        for number, size in uses:
            size = sizes.setdefault(number, size)
            if not is_there(cache, number, size):
                cache.write(name(number), bytes([number]) * size)
                assert is_there(cache, number, size) == (size <= bound)
            if size <= bound:
                recent = [n for n in recent if n != number] + [number]
            kept = stored(Path(folder))
            assert sum(kept.values()) <= bound
            # The least recently used went first: what is kept is an end of `recent`.
            assert set(kept) == set(recent[len(recent) - len(kept) :])


def test_evicting_frees_an_eighth_and_not_more(tmp_path):
    cache = ChunkCache(tmp_path, 1000, itertools.count(1).__next__)
    for number in range(100):
        cache.write(name(number), bytes([number]) * 10)
    assert len(stored(tmp_path)) == 100
    cache.write(name(100), bytes([100]) * 10)
    assert set(stored(tmp_path)) == set(range(13, 101))  # 87 of before, and the new one


def test_a_count_that_was_lost_is_made_again(tmp_path):
    cache = ChunkCache(tmp_path, 1000)
    for number in range(10):
        cache.write(name(number), bytes([number]) * 100)
    for content in (b"", b"nonsense", b"0" * 19 + b"5"):
        (tmp_path / "chunks/usage").write_bytes(content)
        cache.write(name(20), bytes(100))
        cache.write(name(21), bytes(100))
        if content != b"0" * 19 + b"5":
            assert sum(stored(tmp_path).values()) <= 1000


def test_only_chunks_are_removed(tmp_path):
    """The folder may be anybody's: a home folder, even."""
    foreign = [
        tmp_path / "thesis.tex",
        tmp_path / "chunks/readme",
        tmp_path / "chunks" / FOLDER / "notes.txt",
        tmp_path / "chunks" / FOLDER.replace("0", "x", 1) / name(1).rpartition("/")[2],
        tmp_path / "chunks" / f"{1:016x}" / "folder" / "1-0000000000000000",
    ]
    outside = tmp_path / "outside/shard-000000.tar"
    outside.mkdir(parents=True)
    foreign.append(outside / "1-0000000000000000")
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000))
    (tmp_path / "chunks" / f"{2:016x}").symlink_to(tmp_path / "outside")
    cache = ChunkCache(tmp_path, 1000)
    for number in range(50):
        cache.write(name(number), bytes([number]) * 100)
    assert all(path.stat().st_size == 5000 for path in foreign)


def test_what_a_killed_process_left_is_removed_in_its_turn(tmp_path):
    cache = ChunkCache(tmp_path, 1000)
    left = tmp_path / "chunks" / f"{name(7)}.4711.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(900))
    for number in range(8, 30):
        cache.write(name(number), bytes([number]) * 100)
    assert not left.exists()


class _Disturbed(ChunkCache):
    """A cache in which somebody does something at two moments of its next evictions."""

    def __init__(self, *options: Any):
        super().__init__(*options)
        self.before: list[Callable[[], None]] = []  # it was found full, and is not evicting yet
        self.within: list[Callable[[], None]] = []  # it has looked at all files

    def _evict(self, *sizes: int) -> bool:
        if self.before:
            self.before.pop(0)()
        return super()._evict(*sizes)

    def _files(self) -> Iterator[tuple[int, int, str]]:
        files = list(super()._files())
        if self.within:
            self.within.pop(0)()
        yield from files


def test_what_others_write_while_one_evicts_is_evicted_by_it(tmp_path):
    """They do not wait for it, and may write nothing more afterwards."""
    slow, other = _Disturbed(tmp_path, 3000), ChunkCache(tmp_path, 3000)

    def fill() -> None:
        for number in range(100, 140):
            other.write(name(number), bytes(100))

    slow.write(name(0), bytes(100))  # the first one of all counts the files
    slow.within.append(fill)
    for number in range(1, 31):
        slow.write(name(number), bytes(100))
    assert not slow.within and sum(stored(tmp_path).values()) <= 3000


def test_the_count_holds_when_another_has_evicted_first(tmp_path):
    """Else all would go on in the belief that there is room."""
    slow, other = _Disturbed(tmp_path, 3000), ChunkCache(tmp_path, 3000)

    def fill(*numbers: int) -> None:
        for number in numbers:
            other.write(name(number), bytes(100))

    slow.write(name(0), bytes(100))
    slow.before.append(lambda: fill(100))
    slow.within.append(lambda: fill(*range(101, 106)))
    for number in range(1, 31):
        slow.write(name(number), bytes(100))
    assert not slow.before and not slow.within
    assert used_bytes(tmp_path) >= sum(stored(tmp_path).values())


def _fill(folder: Path, first: int) -> None:
    cache = ChunkCache(folder, 3000)
    for turn in range(3):
        for number in range(first, first + 60):
            if not is_there(cache, number, 100):
                cache.write(name(number), bytes([number]) * 100)
        assert turn >= 0


@pytest.mark.process
def test_processes_share_a_cache_and_its_bound(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(tmp_path, 20 * n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    # Each may have been writing one while another evicted.
    assert 2000 <= sum(stored(tmp_path).values()) <= 3000 + 4 * 100
    assert not list((tmp_path / "chunks").glob("*/*/*.partial"))
