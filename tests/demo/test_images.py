"""Every odd or bad file becomes the right picture or one sentence."""

import re
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_yolo.demo.images import MAX_PIXELS, PictureError, load_picture

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"") -> bytes:
    """A PNG whose header says what we like."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def noise(size: int = 200) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


def rotated_jpeg() -> bytes:
    """Stored lying down, to be shown upright: orientation 6, 90° clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(halves(), "JPEG", exif=exif, quality=95)


def transparent_gif() -> bytes:
    image = halves("P")
    hidden = image.getpixel((0, 0))
    return encoded(image, "GIF", transparency=hidden)


def hidden_png() -> bytes:
    """Red that is wholly transparent, blue that is half so."""
    image = halves("RGBA")
    alpha = np.zeros((20, 40), np.uint8)
    alpha[:, 20:] = 128
    image.putalpha(Image.fromarray(alpha))
    return encoded(image, "PNG")


def rgb_16_png() -> bytes:
    row = b"\x00" + b"\xff\xff\x80\x80\x00\x00" * 4
    return png(4, 2, 16, 2, row * 2)


def grey_16_png(transparency: int | None = None) -> bytes:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    options = {} if transparency is None else {"transparency": transparency}
    return encoded(Image.fromarray(values), "PNG", **options)


def float_tiff() -> bytes:
    return encoded(Image.fromarray(np.array([[-1, 0, 1]], dtype=np.float32)), "TIFF")


def grey_16_tiff() -> bytes:
    """Most significant byte first, as microscopes on old Macs wrote it."""
    values = np.array([[0, 257, 32896, 65535]], dtype=">u2")
    return encoded(Image.frombytes("I;16B", (4, 1), values.tobytes()), "TIFF")


def bomb_gif() -> bytes:
    size = struct.pack("<HH", 60_000, 60_000)
    frame = b"," + bytes(4) + size + b"\x00" + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + size + b"\x80\x00\x00" + bytes(6) + frame + b";"


def animated(format: str) -> Callable[[], bytes]:
    def make() -> bytes:
        second = Image.new("RGB", (40, 20), "green")
        lossless = {"lossless": True} if format == "WEBP" else {}
        return encoded(halves(), format, save_all=True, append_images=[second], **lossless)

    return make


GREY = {0: 0, 257: 1, 32896: 128, 65535: 255}

# name: (the file, its size, {(x, y): expected colour})
GOOD = {
    "plain.png": (lambda: encoded(halves(), "PNG"), (40, 20), {(5, 5): RED, (35, 5): BLUE}),
    "rotated.jpg": (rotated_jpeg, (20, 40), {(10, 5): RED, (10, 35): BLUE}),
    "palette.gif": (lambda: encoded(halves("P"), "GIF"), (40, 20), {(5, 5): RED, (35, 5): BLUE}),
    "transparent.gif": (transparent_gif, (40, 20), {(5, 5): WHITE, (35, 5): BLUE}),
    "animated.gif": (animated("GIF"), (40, 20), {(5, 5): RED, (35, 5): BLUE}),
    "animated.webp": (animated("WEBP"), (40, 20), {(5, 5): RED, (35, 5): BLUE}),
    "animated.png": (animated("PNG"), (40, 20), {(5, 5): RED, (35, 5): BLUE}),
    "palette.png": (lambda: encoded(halves("P"), "PNG"), (40, 20), {(5, 5): RED, (35, 5): BLUE}),
    "hidden.png": (hidden_png, (40, 20), {(5, 5): WHITE, (35, 5): (127, 127, 255)}),
    "grey_alpha.png": (
        lambda: encoded(Image.new("LA", (3, 3), (0, 0)), "PNG"),
        (3, 3),
        {(1, 1): WHITE},
    ),
    "cmyk.jpg": (
        lambda: encoded(halves("CMYK"), "JPEG", quality=95),
        (40, 20),
        {(5, 5): RED, (35, 5): BLUE},
    ),
    "grey_16.png": (grey_16_png, (4, 1), {(i, 0): (v,) * 3 for i, v in enumerate(GREY.values())}),
    "grey_16_hidden.png": (lambda: grey_16_png(0), (4, 1), {(0, 0): WHITE, (2, 0): (128,) * 3}),
    "grey_16.tiff": (grey_16_tiff, (4, 1), {(i, 0): (v,) * 3 for i, v in enumerate(GREY.values())}),
    "rgb_16.png": (rgb_16_png, (4, 2), {(0, 0): (255, 128, 0)}),
    "float.tiff": (float_tiff, (3, 1), {(0, 0): (0,) * 3, (1, 0): (128,) * 3, (2, 0): WHITE}),
    "flat.tiff": (
        lambda: encoded(Image.fromarray(np.full((2, 2), 7, np.int32)), "TIFF"),
        (2, 2),
        {(0, 0): (0,) * 3},
    ),
    "bilevel.tiff": (lambda: encoded(halves("1"), "TIFF"), (40, 20), {}),
    "plain.bmp": (lambda: encoded(halves(), "BMP"), (40, 20), {(5, 5): RED}),
    "one_pixel.png": (lambda: encoded(Image.new("RGB", (1, 1), RED), "PNG"), (1, 1), {(0, 0): RED}),
    "sliver.png": (lambda: encoded(Image.new("RGB", (3000, 1), RED), "PNG"), (3000, 1), {}),
    "wrong_name.txt": (lambda: encoded(halves(), "PNG"), (40, 20), {(5, 5): RED}),
    "crooked_exif.jpg": (
        lambda: encoded(halves(), "JPEG", exif=b"Exif\0\0nonsense", quality=95),
        (40, 20),
        {(5, 5): RED},
    ),
}

# name: (the file, what the sentence says)
BAD = {
    "text.jpg": (lambda: b"this is a letter, not a picture\n" * 20, "not a picture"),
    "page.png": (lambda: b"<html><body>404</body></html>", "not a picture"),
    "drawing.svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    "print.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "empty.jpg": (lambda: b"", r"empty \(0 bytes\)"),
    "cut.jpg": (lambda: encoded(noise(), "JPEG")[:9000], "damaged or cut off"),
    "cut.png": (lambda: encoded(noise(), "PNG")[:9000], "damaged or cut off"),
    "cut.gif": (lambda: encoded(noise(), "GIF")[:9000], "damaged or cut off"),
    "cut.webp": (lambda: encoded(noise(), "WEBP")[:9000], "damaged or cut off"),
    "cut.tiff": (lambda: encoded(noise(), "TIFF")[:9000], "damaged or cut off"),
    "header_only.png": (lambda: encoded(noise(), "PNG")[:20], "damaged or cut off"),
    "magic_only.jpg": (lambda: b"\xff\xd8\xff\xe0", "damaged or cut off"),
    "no_pixels.png": (lambda: png(40, 20, 8, 2), "damaged or cut off"),
    "bomb.png": (lambda: png(60_000, 60_000, 8, 2), "64 million pixels"),
    "bomb.gif": (bomb_gif, "64 million pixels"),
    "large.png": (lambda: png(9000, 9000, 8, 2), "9000 × 9000 pixels are too many"),
}


@pytest.mark.parametrize("name", GOOD)
def test_gives_the_right_picture(name: str, tmp_path: Path) -> None:
    make, size, colours = GOOD[name]
    path = tmp_path / name
    path.write_bytes(make())
    picture = load_picture(path)
    assert picture.dtype == np.uint8 and picture.flags.writeable
    assert picture.shape == (size[1], size[0], 3)
    for (x, y), colour in colours.items():
        assert np.abs(picture[y, x].astype(int) - colour).max() <= 3, (x, y)


@pytest.mark.parametrize("name", BAD)
def test_refuses_with_one_sentence(name: str, tmp_path: Path) -> None:
    make, reason = BAD[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(PictureError, match=reason) as refusal:
        load_picture(path)
    sentence = str(refusal.value)
    assert sentence.startswith(f"{name}: ") and sentence.endswith(".")
    assert "\n" not in sentence and "Traceback" not in sentence
    assert refusal.value.exit_code == 2


def test_refuses_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(PictureError, match="no such file"):
            load_picture(path)


def test_refuses_a_bomb_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded: 60,000 × 60,000 pixels would be 10 GiB."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(60_000, 60_000, 8, 2))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("the bomb was decoded"))
    with pytest.raises(PictureError, match="too many"):
        load_picture(path)


def test_limit_is_the_stated_one(tmp_path: Path) -> None:
    rows = (b"\x00" + bytes(1000)) * 8  # 8000 × 8, 1 bit a pixel
    path = tmp_path / "wide.png"
    path.write_bytes(png(8000, 8, 1, 0, rows))
    assert load_picture(path).shape == (8, 8000, 3)
    path.write_bytes(png(8000, MAX_PIXELS // 8000 + 1, 1, 0, rows))
    with pytest.raises(PictureError, match=re.escape("8000 × 8001")):
        load_picture(path)
