"""Every kind of bad input and what becomes of it: the table that `shard` keeps to.

Five images hold five boxes, two of them in a.jpg. `kept` images and boxes go into the shards as
they are, `repaired` ones are made right in the only way that makes sense, `refused` ones are left
out; the report tells of both, and strict refuses the whole. `stops` is refused either way.
"""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.findings import KINDS, Findings
from convnext_yolo.data_prep.formats import read_coco
from convnext_yolo.data_prep.reader import ShardReader
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.data_prep.verify import verify

from .conftest import CocoFiles, picture

Spoil = Callable[[CocoFiles], Any]


class Case(NamedTuple):
    spoil: Spoil
    outcome: str  # kept | repaired | refused | stops
    kind: str = ""  # of `findings.KINDS`
    part: str = ""  # of the sentence
    samples: int = 5  # in the shards
    boxes: int = 5


def annotation(**values: Any) -> Spoil:
    """Changes the first one, of a.jpg (48x32 px)."""
    return lambda files: files.document["annotations"][0].update(values)


def bbox(*numbers: Any) -> Spoil:
    return annotation(bbox=list(numbers))


def image(position: int, **values: Any) -> Spoil:
    return lambda files: files.document["images"][position].update(values)


def whole(key: str, value: Any) -> Spoil:
    return lambda files: files.document.update({key: value})


def save(position: int, made: Image.Image, form: str, **options: Any) -> Spoil:
    """Another picture in the place of an image file, whatever its name says."""
    return lambda files: made.save(files.image(position), format=form, **options)


def cut(position: int, part: float) -> Spoil:
    def spoil(files: CocoFiles) -> None:
        data = files.image(position).read_bytes()
        files.image(position).write_bytes(data[: int(len(data) * part)])

    return spoil


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def of_size(position: int, size: tuple[int, int]) -> Spoil:
    """The picture and its annotation are of that size, and it has no boxes."""

    def spoil(files: CocoFiles) -> None:
        Image.new("RGB", size).save(files.image(position))
        files.document["images"][position].update(width=size[0], height=size[1])
        files.document["annotations"] = files.document["annotations"][1:2]

    return spoil


def bomb(files: CocoFiles) -> None:
    """A PNG header of 20,000 x 20,000 px."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    files.image(2).write_bytes(data)
    image(2, width=20_000, height=20_000)(files)


def damaged_inside(files: CocoFiles) -> None:
    """A PNG with a good header and a good end."""
    data = bytearray(files.image(2).read_bytes())
    data[len(data) // 2] ^= 255
    files.image(2).write_bytes(data)


def animated(form: str) -> Spoil:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    return save(2, frames[0], form, save_all=True, append_images=frames[1:])


def grey16(files: CocoFiles) -> None:
    pixels = np.linspace(0, 65535, 40 * 40).astype(np.uint16).reshape(40, 40)
    Image.fromarray(pixels).save(files.image(2))


def two_of(key: str, position: int, **values: Any) -> Spoil:
    return lambda files: files.document[key].append({**files.document[key][position], **values})


def raw(content: bytes) -> Spoil:
    """Instead of the JSON."""
    return lambda files: files.document.update(raw=content)


rgb = picture((48, 32), 7)
nan, inf = float("nan"), float("inf")

CASES = {
    # the file of annotations
    "not JSON": Case(raw(b"{"), "stops", part="not valid JSON"),
    "a results file": Case(raw(b"[]"), "stops", part="not a results file"),
    "no images key": Case(lambda f: f.document.pop("images"), "stops", part="images is missing"),
    "empty image list": Case(whole("images", []), "stops", part="images is empty"),
    "no categories": Case(whole("categories", []), "stops", part="categories is empty"),
    "two images with one id": Case(image(1, id=70), "stops", part="image id 70 is given 2 times"),
    "two images of one file": Case(image(1, file_name="a.jpg"), "stops", part="file_name 'a.jpg'"),
    "two categories with one id": Case(two_of("categories", 0, name="cow"), "stops", part="id 9"),
    "no image folder": Case(
        lambda f: shutil.move(f.images, f.folder / "moved"), "stops", part="no such image folder"
    ),
    "another image folder": Case(
        lambda f: (shutil.move(f.images, f.folder / "moved"), f.images.mkdir()),
        "stops",
        part="is not in",
    ),
    "no annotations": Case(whole("annotations", []), "kept", boxes=0),
    # entries of images
    "image without id": Case(
        lambda f: f.document["images"][3].pop("id"), "refused", "image_entry", "images[3]", 4
    ),
    "path out of the folder": Case(
        image(3, file_name="../d.webp"), "refused", "image_entry", "leaves the image folder", 4
    ),
    "image size null": Case(image(3, width=None), "refused", "image_entry", "width is None", 4),
    # image files
    "missing image": Case(
        lambda f: f.image(0).unlink(), "refused", "image_missing", "'a.jpg' is not in", 4, 3
    ),
    "empty image file": Case(cut(0, 0), "refused", "image_damaged", "file is empty", 4, 3),
    "text named .jpg": Case(
        lambda f: f.image(0).write_text("<html>"), "refused", "image_damaged", "not an image", 4, 3
    ),
    "JPEG cut short": Case(cut(0, 0.9), "refused", "image_damaged", "a.jpg", 4, 3),
    "PNG cut short": Case(cut(2, 0.9), "refused", "image_damaged", "c.png", 4, 4),
    "WebP cut short": Case(cut(3, 0.9), "refused", "image_damaged", "d.webp", 4),
    "BMP cut short": Case(cut(4, 0.9), "refused", "image_damaged", "e.bmp", 4, 4),
    "PNG damaged inside": Case(
        damaged_inside, "refused", "image_damaged", "can't be decoded", 4, 4
    ),
    "GIF named .jpg": Case(
        save(0, rgb.convert("P"), "GIF"), "refused", "image_format", "is a GIF image", 4, 3
    ),
    "TIFF named .png": Case(
        save(2, picture((40, 40), 1), "TIFF"), "refused", "image_format", "is a TIFF image", 4, 4
    ),
    "animated PNG": Case(animated("PNG"), "refused", "image_animated", "an animation", 4, 4),
    "animated WebP": Case(animated("WEBP"), "refused", "image_animated", "an animation", 4, 4),
    "20,000 x 20,000 px": Case(bomb, "refused", "image_too_large", "too many pixels", 4, 4),
    "another size": Case(
        save(0, picture((30, 20), 1), "JPEG"), "refused", "image_size", "is 30x20 px", 4, 3
    ),
    "annotated as EXIF turns it": Case(
        save(0, picture((32, 48), 1), "JPEG", exif=exif(6)),
        *("refused", "image_turned", "EXIF orientation 6", 4, 3),
    ),
    "annotated as stored, with EXIF rotation": Case(save(0, rgb, "JPEG", exif=exif(6)), "kept"),
    "PNG named .jpg": Case(save(0, rgb, "PNG"), "kept"),
    "CMYK": Case(save(0, rgb.convert("CMYK"), "JPEG"), "kept"),
    "grey": Case(save(0, rgb.convert("L"), "JPEG"), "kept"),
    "16-bit": Case(grey16, "kept"),
    "1x1 px": Case(of_size(0, (1, 1)), "kept", boxes=1),
    "a side of 20,000 px": Case(of_size(0, (20_000, 3)), "kept", boxes=1),
    # annotations
    "annotation that is no object": Case(
        lambda f: f.document["annotations"].append([]),
        *("refused", "annotation_entry", "annotations[5]"),
    ),
    "iscrowd of 2": Case(
        annotation(iscrowd=2), "refused", "annotation_entry", "iscrowd is 2", boxes=4
    ),
    "crowd box": Case(annotation(iscrowd=1), "kept"),
    "annotation without id": Case(annotation(id=None), "repaired", "annotation_id", "id is None"),
    "two annotations with one id": Case(
        annotation(id=2), "repaired", "annotation_id", "annotation id 2"
    ),
    "annotation of no image": Case(
        annotation(image_id=71), "refused", "unknown_image", "image_id 71", boxes=4
    ),
    "unknown category": Case(
        annotation(category_id=4), "refused", "unknown_category", "category_id 4", boxes=4
    ),
    "no box": Case(annotation(bbox=None), "refused", "box_values", "bbox is None", boxes=4),
    "box of three": Case(bbox(1, 2, 3), "refused", "box_values", "four finite", boxes=4),
    "NaN box": Case(bbox(nan, 2, 3, 4), "refused", "box_values", "nan", boxes=4),
    "infinite box": Case(bbox(1, 2, inf, 4), "refused", "box_values", "inf", boxes=4),
    "box of a huge integer": Case(bbox(1, 2, 10**400, 4), "refused", "box_values", boxes=4),
    "negative side": Case(bbox(9, 2, -3, 4), "refused", "box_negative", "negative", boxes=4),
    "box outside": Case(bbox(60, 2, 9, 4), "refused", "box_outside", "no area inside", boxes=4),
    "box over the border": Case(bbox(20, 2, 300, 4), "repaired", "box_clipped", "272.0 px outside"),
    "negative area": Case(annotation(area=-1), "repaired", "area", "area is -1"),
    "NaN area": Case(annotation(area=nan), "repaired", "area", "area is nan"),
    # COCO itself has these two: strict takes them as well
    "zero-area box": Case(bbox(10, 2, 3, 0), "refused", "box_empty", "height of zero", boxes=4),
    "box over the border by a pixel": Case(bbox(28, 2, 21, 4), "repaired", "box_rounded", "1.0 px"),
}


def shard(files: CocoFiles, output: Path, strict: bool) -> tuple[Any, dict[str, Any]]:
    raw_json = files.document.pop("raw", None)
    text = json.dumps(files.document).encode() if raw_json is None else raw_json
    files.annotations.write_bytes(text)
    dataset = read_coco(files.annotations, files.images, Findings(strict))
    manifest, _ = shard_dataset(dataset, output, samples_per_shard=2, progress=False)
    return manifest, json.loads((output / "report.json").read_text())


def assert_sentence(text: str) -> None:
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 700


@pytest.mark.parametrize("name", CASES)
def test_bad_input(coco_files: CocoFiles, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.spoil(coco_files)
    if case.outcome == "stops":
        with pytest.raises(DataError) as caught:
            shard(coco_files, tmp_path / "out", strict=False)
        assert_sentence(str(caught.value))
        assert case.part in str(caught.value)
        assert not (tmp_path / "out").exists()
        return
    given = len(coco_files.document["images"]), len(coco_files.document["annotations"])
    manifest, report = shard(coco_files, tmp_path / "out", strict=False)
    assert (manifest.samples, manifest.boxes) == (case.samples, case.boxes)
    assert report["images"] == {"given": given[0], "kept": case.samples}
    assert report["annotations"] == {"given": given[1], "kept": case.boxes}
    found = [(problem["kind"], problem["outcome"]) for problem in report["problems"]]
    assert found == ([] if case.outcome == "kept" else [(case.kind, case.outcome)])
    for problem in report["problems"]:
        assert problem["count"] == len(problem["examples"]) == 1
        assert_sentence(problem["examples"][0])
        assert case.part in problem["examples"][0]
    assert verify(tmp_path / "out", progress=False) == []
    reader = ShardReader(tmp_path / "out")
    for position, (width, height) in enumerate(reader.sizes_px().tolist()):
        pixels = reader.decode(position).image
        assert (pixels.shape, pixels.dtype) == ((height, width, 3), np.uint8)


@pytest.mark.parametrize("name", CASES)
def test_strict_refuses_what_is_not_kept(coco_files: CocoFiles, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.spoil(coco_files)
    if case.outcome == "kept" or (case.kind and not KINDS[case.kind].stops_strict):
        manifest, _ = shard(coco_files, tmp_path / "out", strict=True)
        assert (manifest.samples, manifest.boxes) == (case.samples, case.boxes)
        return
    with pytest.raises(DataError) as caught:
        shard(coco_files, tmp_path / "out", strict=True)
    assert_sentence(str(caught.value))
    assert case.part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_table_has_every_kind_that_coco_files_can_show() -> None:
    of_other_formats = {"label_file", "image_name", "size_missing"}
    assert {case.kind for case in CASES.values()} - {""} == set(KINDS) - of_other_formats
