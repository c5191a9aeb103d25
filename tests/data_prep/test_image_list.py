"""Lists of images: folders count as far as both sides have them."""

from __future__ import annotations

import errno

import pytest
from PIL import Image

from convnext_yolo.data_prep.errors import DataError, RefusedError
from convnext_yolo.data_prep.image_header import stored_size, unreadable
from convnext_yolo.data_prep.image_list import choose, read_image_list


@pytest.mark.parametrize(
    ("line", "chosen"),
    [
        ("./images/train/1.jpg", ["train/1.jpg"]),
        ("train/1", ["train/1.jpg"]),
        ("1", ["train/1.jpg", "val/1.jpg"]),
        ("1.jpg", ["train/1.jpg", "val/1.jpg"]),
        ("val/2.5.png", ["val/2.5.png"]),
        ("test/1.jpg", []),
    ],
)
def test_lines_choose(tmp_path, line, chosen):
    (tmp_path / "list.txt").write_text(f"{line}\n\n")
    listed = read_image_list(tmp_path / "list.txt")
    found, absent = choose(["train/1.jpg", "val/1.jpg", "val/2.5.png"], listed)
    assert found == chosen
    assert len(absent) == (0 if chosen else 1)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_picture_whose_size_only_it_knows_must_not_be_turned(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "p.jpg", exif=exif)
    if orientation == 1:
        assert stored_size(tmp_path / "p.jpg") == (40, 30)
        return
    with pytest.raises(RefusedError, match="EXIF orientation turns it") as error:
        stored_size(tmp_path / "p.jpg")
    assert error.value.kind == "image_turned"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOENT])
def test_what_may_pass_ends_the_run_and_refuses_no_image(tmp_path, number):
    error = unreadable(tmp_path / "p.jpg", OSError(number, "it failed"))
    assert isinstance(error, RefusedError) == (number == errno.ENOENT)
    assert isinstance(error, DataError) and "it failed" in str(error)
