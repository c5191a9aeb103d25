"""One sample in a tar: how it is named, written, read back and checked.

A sample is two members side by side, `<key>.<jpg|png|webp|bmp>` with the original bytes of the
image file and `<key>.json` with its annotations. The key is the image id in 12 digits or more.

Legend: N boxes of one image, xyxy in pixels.
"""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from .records import ImageRecord

IMAGE_EXTENSIONS = ("bmp", "jpg", "png", "webp")


def sample_key(image_id: int) -> str:
    """The key of an image's sample: `000000000042`."""
    return f"{image_id:012d}"


def encode_annotations(record: ImageRecord) -> bytes:
    """The JSON member of a record, the same bytes for the same record on every machine."""
    document = {
        "image_id": record.id,
        "file_name": record.file_name,
        "width": record.width,
        "height": record.height,
        "boxes": [_numbers(box) for box in record.boxes_xyxy],
        "labels": record.labels.tolist(),
        "crowd": record.crowd.tolist(),
        "area": _numbers(record.area),
        "annotation_ids": record.annotation_ids,
    }
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def _numbers(values: np.ndarray) -> list[float]:
    """float32 in the fewest digits that give the same float32 again: 153.45, not 153.449996948."""
    return [float(str(value)) for value in values]


def stored_image(shard: Path, offset: int) -> bytes:
    """The image file's bytes of the sample at `offset`, in bytes."""
    with shard.open("rb") as file:
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None and member.name.endswith(IMAGE_EXTENSIONS):
                    return content.read()
    return b""


def check_sample(
    members: dict[str, bytes], image_id: int, size_px: tuple[int, int], class_count: int
) -> tuple[str, int]:
    """Compare a sample with what the manifest says of it.

    Returns:
        What is wrong in a few words, or nothing; and the number of boxes.
    """
    images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    if len(images) != 1 or set(members) != {images[0], "json"}:
        return f"has the members {sorted(members)}, not one image and json", 0
    if not members[images[0]]:
        return "has an empty image", 0
    try:
        annotations = json.loads(members["json"])
        return _annotation_problem(annotations, image_id, size_px, class_count)
    except KeyError as error:
        return f"lacks {error.args[0]} in its JSON", 0
    except (ValueError, TypeError, RecursionError) as error:
        return f"has broken JSON ({error})", 0


def _annotation_problem(
    annotations: dict[str, Any], image_id: int, size_px: tuple[int, int], class_count: int
) -> tuple[str, int]:
    width, height = size_px
    expected = {"image_id": image_id, "width": width, "height": height}
    for key, value in expected.items():
        if annotations[key] != value:
            return f"has {key} {annotations[key]!r} in its JSON, the manifest says {value}", 0
    labels = annotations["labels"]
    count = len(labels)
    for key in ("boxes", "crowd", "area", "annotation_ids"):
        if len(annotations[key]) != count:
            return f"has {len(annotations[key])} {key} for {count} labels", 0
    if any(type(label) is not int or not 0 <= label < class_count for label in labels):
        return f"has labels outside the {class_count} classes", 0
    if not all(math.isfinite(area) and area >= 0 for area in annotations["area"]):
        return "has an area that is no number from 0 up", 0
    boxes_xyxy = np.array(annotations["boxes"], dtype=np.float64).reshape(count, 4)
    x1, y1, x2, y2 = boxes_xyxy.T
    good = (x1 >= 0) & (x1 < x2) & (x2 <= width) & (y1 >= 0) & (y1 < y2) & (y2 <= height)
    if not good.all():  # nan is not good either
        return f"has the box {boxes_xyxy[int(good.argmin())].tolist()} that is not inside it", 0
    return "", count
