"""One decoder for training, evaluation and measurements.

JPEG goes to simplejpeg (libjpeg-turbo, exact DCT), everything else and what simplejpeg refuses
to OpenCV. On JPEG the two give the same pixels; OpenCV takes 5 to 20 % longer.
"""

import cv2
import numpy as np
import simplejpeg


def decode_image(encoded: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """An encoded picture → `[H, W, 3]` uint8, RGB, as stored.

    Boxes refer to the stored pixels, so an EXIF orientation does not turn them.

    Args:
        encoded: the file's bytes.
        out: bytes in a row that the pixels may be written to; used for a JPEG that fits there.

    Raises:
        ValueError: no picture, or one that is damaged: the reason in a few words.
    """
    if encoded[:3] == b"\xff\xd8\xff":
        try:
            if out is not None:
                height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
                out = out[: height * width * 3] if height * width * 3 <= out.size else None
            return simplejpeg.decode_jpeg(encoded, "RGB", strict=True, buffer=out)
        except ValueError:
            pass  # stray bytes, which OpenCV forgives, or a file cut short, which it does not
    return _decode_with_opencv(encoded)


def _decode_with_opencv(encoded: bytes) -> np.ndarray:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # no bytes at all, or too many pixels
        image = None
    if image is None:
        raise ValueError("holds a picture that can't be decoded")
    return image
