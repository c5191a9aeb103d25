from __future__ import annotations

import io
import zlib

import pytest
from PIL import Image

from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.verify import verify


def cut(files, position: int, keep: float) -> None:
    path = files.image(position)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def with_end_marker_inside(files) -> None:
    """A JPEG whose comment holds an end marker, as a thumbnail does, cut in its scan data."""
    image = Image.open(files.image(0))
    image.save(files.image(0), comment=b"thumbnail \xff\xd9 ends")
    cut(files, 0, 0.8)


def turned(files) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 48)).save(files.image(0), exif=exif)


def animated(files, position: int) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(files.image(position), save_all=True, append_images=frames[1:])


def bomb(files) -> None:
    """A PNG header of 60,000 x 60,000 px."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    files.image(2).write_bytes(data)


BAD_IMAGES = {
    "empty": (lambda f: f.image(0).write_bytes(b""), ["a.jpg", "is empty"]),
    "text": (lambda f: f.image(0).write_text("<html>"), ["a.jpg", "is not an image"]),
    "cut jpeg": (lambda f: cut(f, 0, 0.9), ["a.jpg", "is cut short at byte", "fetch it again"]),
    "cut jpeg with a thumbnail": (with_end_marker_inside, ["a.jpg", "is cut short"]),
    "cut jpeg header": (lambda f: cut(f, 0, 0.01), ["a.jpg"]),
    "cut png": (lambda f: cut(f, 2, 0.9), ["c.png", "is cut short"]),
    "cut webp": (lambda f: cut(f, 3, 0.9), ["d.webp"]),
    "cut bmp": (lambda f: cut(f, 4, 0.9), ["e.bmp", "damaged"]),
    "gif named jpg": (
        lambda f: Image.new("P", (48, 32)).save(f.image(0), format="GIF"),
        ["a.jpg", "is a GIF image", "convert it to JPEG, PNG, WebP or BMP"],
    ),
    "tiff named png": (
        lambda f: Image.new("RGB", (40, 40)).save(f.image(2), format="TIFF"),
        ["c.png", "is a TIFF image"],
    ),
    "other size": (
        lambda f: Image.new("RGB", (30, 20)).save(f.image(0)),
        ["a.jpg", "is 30x20 px", "image 70", "annotated as 48x32", "correct width and height"],
    ),
    "turned by exif": (turned, ["a.jpg", "is 32x48 px", "EXIF orientation 6"]),
    "animated png": (lambda f: animated(f, 2), ["c.png", "is an animation"]),
    "too many pixels": (bomb, ["c.png", "too many pixels"]),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_gives_one_sentence_and_no_output(coco_files, tmp_path, case):
    spoil, parts = BAD_IMAGES[case]
    spoil(coco_files)
    with pytest.raises(DataError) as caught:
        coco_files.shard(tmp_path / "new" / "deep" / "out")
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    for part in parts:
        assert part in text
    assert not (tmp_path / "new" / "deep" / "out").exists()


def odd_but_good() -> dict[str, bytes]:
    def encode(image: Image.Image, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, **options)
        return buffer.getvalue()

    colour, grey = Image.new("RGB", (48, 32), "teal"), Image.new("L", (48, 32))
    return {
        "png named jpg": encode(colour, format="PNG"),
        "progressive": encode(colour, format="JPEG", progressive=True),
        "cmyk": encode(colour.convert("CMYK"), format="JPEG"),
        "grey": encode(grey, format="JPEG"),
        "16-bit": encode(Image.new("I;16", (48, 32)), format="PNG"),
        "palette with transparency": encode(grey.convert("P"), format="PNG", transparency=0),
        "bytes after the end": encode(colour, format="JPEG") + b"\0" * 100 + b"\xff\xd9 junk",
        "several pictures (mpo)": encode(colour, format="MPO", save_all=True, append_images=[grey]),
    }


@pytest.mark.parametrize("case", odd_but_good())
def test_an_odd_but_good_image_keeps_its_bytes(coco_files, tmp_path, case):
    data = odd_but_good()[case]
    coco_files.image(0).write_bytes(data)
    coco_files.shard(tmp_path / "out")
    stored = (tmp_path / "out" / "shard-000001.tar").read_bytes()
    extension = "png" if data.startswith(b"\x89PNG") else "jpg"
    assert data in stored
    assert f"000000000070.{extension}".encode() in stored
    assert verify(tmp_path / "out", progress=False) == []


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3)])
def test_extreme_sizes(coco_files, tmp_path, save_picture, size):
    save_picture(coco_files.image(0), size)
    coco_files.document["images"][0].update(width=size[0], height=size[1])
    coco_files.document["annotations"] = []
    manifest = coco_files.shard(tmp_path / "out")
    assert manifest.shards[1].sizes.tolist()[1] == list(size)
