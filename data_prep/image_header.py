"""A look at an image file: what it is, how large, whether it ends, and whether it decodes."""

from __future__ import annotations

import contextlib
import errno
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .decode import decode_image
from .errors import DataError, RefusedError
from .records import ImageRecord

# MPO is a JPEG with further pictures behind it (phones, stereo cameras); decoders take the first.
_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
_PNG_END = b"IEND\xaeB`\x82"
_EXIF_ORIENTATION = 0x0112
_TURNED_BY_A_QUARTER = (5, 6, 7, 8)
# A file that can't be read for these will not be readable the next time either.
_LASTING = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.ELOOP, errno.ENAMETOOLONG, None),
}


def check_image(data: bytes, record: ImageRecord) -> str:
    """Decode an image and compare it with its annotations.

    What is stored counts: an EXIF orientation turns neither the picture nor its size.

    Args:
        data: the whole image file.
        record: what the annotations say of it.

    Returns:
        The extension that fits the content: jpg, png, webp or bmp.

    Raises:
        RefusedError: the file is empty, cut short, damaged, no image, of another format, animated,
            too large to decode (over Pillow's limit of 179 million pixels), or not of the
            annotated size.
    """
    path = record.path
    with _opened(data, path) as image:
        extension = _accepted(image, path)
        if image.size != (record.width, record.height):
            raise _wrong_size(image, record)
        if extension == "bmp":  # OpenCV forgives missing rows; not compressed, so a mere copy
            image.load()
    if _is_cut_short(data, extension):
        raise _damaged(path, f"the image is cut short at byte {len(data)}")
    try:
        shape = decode_image(data).shape
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if shape != (record.height, record.width, 3):
        raise _damaged(path, f"decodes to {shape[1]}x{shape[0]} px, its header says otherwise")
    return extension


def stored_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file in pixels, as stored; only its header is read.

    Raises:
        RefusedError: no such file, no image, or one that `check_image` would refuse as well.
    """
    with _opened(path, path) as image:
        _accepted(image, path)
        # Nobody says which way the annotator saw it, and with no annotated size nothing tells.
        if image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1):
            raise RefusedError(
                "image_turned",
                f"{path}: its EXIF orientation turns it on display, and its boxes may be of "
                "either; turn the stored pixels (`exiftran -ai`) and annotate those.",
            )
        return image.size


def unreadable(path: Path, error: OSError) -> DataError:
    """What to raise where an image file can't be opened or read.

    What may pass, such as a file server that is away, refuses no image: it ends the run.
    """
    if error.errno not in _LASTING:
        return DataError(
            f"{path}: the image can't be read ({error.strerror}); mend that and start again, to "
            "go on from there."
        )
    return RefusedError(
        "image_missing", f"{path}: the image can't be read ({error.strerror}); restore it."
    )


@contextlib.contextmanager
def _opened(source: bytes | Path, path: Path) -> Iterator[Image.Image]:
    """The image with its header read; whatever Pillow makes of a bad one ends in a sentence."""
    if source == b"":
        raise _damaged(path, "the image file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large or oddly tagged images: no concern here
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                yield image
    except UnidentifiedImageError:
        raise RefusedError(
            "image_damaged", f"{path}: is not an image; replace it or take it out."
        ) from None
    except Image.DecompressionBombError:
        raise RefusedError(
            "image_too_large", f"{path}: has too many pixels to decode; make the image smaller."
        ) from None
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of all kinds, deep in Pillow's plugins
        if isinstance(source, Path) and isinstance(error, OSError) and error.errno:
            raise unreadable(path, error) from None
        raise _damaged(path, f"the image is damaged ({error})") from None


def _damaged(path: Path, what: str) -> RefusedError:
    return RefusedError("image_damaged", f"{path}: {what}; fetch it again.")


def _accepted(image: Image.Image, path: Path) -> str:
    extension = _EXTENSION_OF_FORMAT.get(image.format or "")
    if extension is None:
        raise RefusedError(
            "image_format",
            f"{path}: is a {image.format} image; convert it to JPEG, PNG, WebP or BMP.",
        )
    if extension in ("png", "webp") and getattr(image, "is_animated", False):
        raise RefusedError(
            "image_animated", f"{path}: is an animation; convert it to a single picture."
        )
    return extension


def _wrong_size(image: Image.Image, record: ImageRecord) -> RefusedError:
    width, height = image.size
    kind, mend = "image_size", "correct width and height in the annotations"
    orientation = image.getexif().get(_EXIF_ORIENTATION)
    if orientation in _TURNED_BY_A_QUARTER and image.size == (record.height, record.width):
        kind = "image_turned"
        mend = (
            f"its EXIF orientation {orientation} turns it on display, so turn the stored pixels "
            "(`exiftran -ai`) or annotate them as stored"
        )
    return RefusedError(
        kind,
        f"{record.path}: is {width}x{height} px, image {record.id} is annotated as "
        f"{record.width}x{record.height}; {mend}.",
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
