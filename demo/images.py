"""The one way by which a file becomes pixels: right, or refused with one sentence.

Phones, microscopes and the web deliver more than 8-bit RGB: rotated JPEGs, 16-bit greys, palettes,
CMYK, transparency, animations. Each has its right 8-bit RGB picture, and `load_picture` gives it.
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# 64 megapixels: the sensor of nearly every phone; at most 1.3 GiB while decoding (float TIFF).
MAX_PIXELS = 64_000_000

# Only formats that Pillow decodes itself: EPS, for one, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
_KNOWN = "JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF or PPM"


class PictureError(Exception):
    """A file that can't be shown. The text is one sentence that names the file and the reason."""

    exit_code = 2


def load_picture(path: Path) -> np.ndarray:
    """Reads a picture file as it is meant to be seen.

    EXIF rotation is applied, transparency lies on white, an animation gives its first frame,
    16-bit greys are scaled by 1/257 to 8 bits, 32-bit ones (TIFF) over the range that occurs.

    Returns:
        RGB `[H, W, 3]` uint8, writable.

    Raises:
        PictureError: missing, empty, not a picture, damaged, or larger than `MAX_PIXELS`.
    """
    with _open(path) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise _too_large(path, f"{width} × {height} pixels")
        try:
            image.load()
            return np.array(_to_rgb(_upright(image)))
        except Image.DecompressionBombError as error:  # a frame larger than its file's header said
            raise _too_large(path, "a frame of too many pixels") from error
        except MemoryError as error:
            raise PictureError(f"{path.name}: not enough memory for this picture.") from error
        except Exception as error:
            # Decoders fail on damaged data in any way they like: OSError, SyntaxError,
            # struct.error, ValueError, … To the user all of it means the same.
            raise _damaged(path) from error


def _open(path: Path) -> Image.Image:
    """Reads the header only."""
    if not path.is_file():
        raise PictureError(f"{path.name}: no such file.")
    if path.stat().st_size == 0:
        raise PictureError(f"{path.name}: the file is empty (0 bytes).")
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # AVIF is optional in Pillow
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is above ours: we refuse before it needs to warn.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path, formats=formats)
    except Image.DecompressionBombError as error:
        raise _too_large(path, "more than twice as many pixels") from error
    except Exception as error:  # see load_picture
        if isinstance(error, UnidentifiedImageError) and not _begins_like_a_picture(path, formats):
            raise PictureError(
                f"{path.name}: not a picture in a known format ({_KNOWN})."
            ) from error
        raise _damaged(path) from error


def _begins_like_a_picture(path: Path, formats: list[str]) -> bool:
    with path.open("rb") as file:
        prefix = file.read(16)
    accepts = (Image.OPEN[name][1] for name in formats)
    return any(accept is not None and accept(prefix) is True for accept in accepts)


def _damaged(path: Path) -> PictureError:
    return PictureError(f"{path.name}: the picture is damaged or cut off, so it can't be decoded.")


def _too_large(path: Path, size: str) -> PictureError:
    return PictureError(
        f"{path.name}: {size} are too many; the limit is {MAX_PIXELS // 1_000_000} million pixels."
    )


def _upright(image: Image.Image) -> Image.Image:
    """Applies the camera's rotation. Unreadable EXIF data is as good as none."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _grey_16(image)
    elif image.mode in ("I", "F"):
        image = _stretched(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture)
        return white
    return image.convert("RGB")


def _grey_16(image: Image.Image) -> Image.Image:
    """16-bit grey → 8-bit grey, with its transparent value as an alpha channel."""
    values = np.asarray(image).astype(np.uint32)  # [H, W]
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _stretched(image: Image.Image) -> Image.Image:
    """Grey of 32-bit integers or floats → 8-bit grey over the range that occurs."""
    values = np.nan_to_num(np.asarray(image, np.float32), nan=0.0, posinf=0.0, neginf=0.0)  # [H, W]
    values -= values.min()
    values *= 255 / max(float(values.max()), 1e-30)  # all equal: black
    return Image.fromarray(np.round(values, out=values).astype(np.uint8))
