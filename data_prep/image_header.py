"""A look at an image file without decoding it: what it is, how large, and whether it ends."""

from __future__ import annotations

import io
import warnings

from PIL import Image, UnidentifiedImageError

from .errors import DataError
from .formats import ImageRecord

# MPO is a JPEG with further pictures behind it (phones, stereo cameras); decoders take the first.
_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
_PNG_END = b"IEND\xaeB`\x82"
_EXIF_ORIENTATION = 0x0112
_TURNED_BY_A_QUARTER = (5, 6, 7, 8)


def image_extension(data: bytes, record: ImageRecord) -> str:
    """The extension that fits the content: jpg, png, webp or bmp.

    Args:
        data: the whole image file.
        record: what the annotations say of it.

    Raises:
        DataError: the file is empty, cut short, no image, of another format, animated, too large
            to decode, or not of the annotated size.
    """
    path = record.path
    if not data:
        raise DataError(f"{path}: the image file is empty; fetch it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large or oddly tagged images: no concern here
            with Image.open(io.BytesIO(data)) as image:
                extension = _accepted(image.format, record)
                if extension in ("png", "webp") and getattr(image, "is_animated", False):
                    raise DataError(f"{path}: is an animation; convert it to a single picture.")
                if image.size != (record.width, record.height):
                    raise DataError(_size_sentence(image, record))
                if extension == "bmp":  # not compressed: reading it all is a mere copy
                    image.load()
    except UnidentifiedImageError:
        raise DataError(f"{path}: is not an image; replace it or take it out.") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: has too many pixels to decode; make the image smaller.") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path}: the image is damaged ({error}); fetch it again.") from None
    if _is_cut_short(data, extension):
        raise DataError(f"{path}: the image is cut short at byte {len(data)}; fetch it again.")
    return extension


def _accepted(image_format: str | None, record: ImageRecord) -> str:
    extension = _EXTENSION_OF_FORMAT.get(image_format or "")
    if extension is None:
        raise DataError(
            f"{record.path}: is a {image_format} image; convert it to JPEG, PNG, WebP or BMP."
        )
    return extension


def _size_sentence(image: Image.Image, record: ImageRecord) -> str:
    width, height = image.size
    mend = "correct width and height in the annotations"
    orientation = image.getexif().get(_EXIF_ORIENTATION)
    if orientation in _TURNED_BY_A_QUARTER and image.size == (record.height, record.width):
        mend = (
            f"its EXIF orientation {orientation} turns it on display, so turn the stored pixels "
            "(`exiftran -ai`) or annotate them as stored"
        )
    return (
        f"{record.path}: is {width}x{height} px, image {record.id} is annotated as "
        f"{record.width}x{record.height}; {mend}."
    )


def _is_cut_short(data: bytes, extension: str) -> bool:
    """Whether the end of the file is missing. Bytes after the end are common and harmless."""
    if extension == "jpg":
        # The end marker can't occur inside the scan data, but it can in a thumbnail before it.
        return data.rfind(b"\xff\xd9") < _start_of_scan(data)
    if extension == "png":
        return _PNG_END not in data[-4096:] and _PNG_END not in data
    if extension == "webp":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return False


def _start_of_scan(data: bytes) -> int:
    """Where a JPEG's first scan begins, or the end of the data if there is none."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return position
        # 0xFF before a marker is padding; every segment before the scan carries its length.
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        position += 1 if marker == 0xFF else 2 + length
    return len(data)
