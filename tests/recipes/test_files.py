"""A file that is written is whole, or is what it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convnext_yolo.recipes.files import whole_file, write_whole


def test_missing_folders_are_made_and_nothing_else_stays(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "a.json", "größer\n")
    write_whole(tmp_path / "new" / "a.json", "again\n")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
    assert (tmp_path / "new" / "a.json").read_text(encoding="utf-8") == "again\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_it_is_what_it_was(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(type(error)), whole_file(tmp_path / "a") as partial:
        partial.write_text("hal")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "a").read_text() == "text"


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    """As /dev/null does, even where root writes to it."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text"
    assert (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "text")
    assert list(tmp_path.iterdir()) == []
