from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.class_list import read_class_names
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.findings import Findings
from convnext_yolo.data_prep.formats import (
    Category,
    DetectionDataset,
    read_coco,
    read_dataset,
    read_yolo,
)
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.data_prep.verify import verify

from .conftest import picture


class YoloFiles:
    """Three pictures, one of a folder below and one without objects; three boxes."""

    def __init__(self, folder: Path):
        self.labels, self.images = folder / "labels", folder / "images"
        (self.labels / "sub").mkdir(parents=True)
        (self.images / "sub").mkdir(parents=True)
        picture((40, 20), 1).save(self.images / "a.jpg")
        picture((10, 50), 2).save(self.images / "empty.bmp")
        picture((100, 100), 3).save(self.images / "sub" / "c.png")
        self.classes = self.labels / "classes.txt"
        self.classes.write_text("dog\ncat\n")
        self.write("a", "0 0.5 0.5 1 1\n1 0.25 0.5 0.1 0.2\n")
        self.write("sub/c", "1 0.1 0.1 0.3 0.1 0.3 0.5\n")

    def write(self, stem: str, text: str) -> None:
        (self.labels / f"{stem}.txt").write_text(text)

    def read(self, findings: Findings | None = None, **options: Path) -> DetectionDataset:
        return read_yolo(self.labels, self.images, self.classes, findings=findings, **options)


@pytest.fixture
def yolo(tmp_path: Path) -> YoloFiles:
    return YoloFiles(tmp_path / "data")


def test_boxes_and_polygons_become_pixels(yolo):
    dataset = yolo.read()
    assert dataset.categories == (Category(0, "dog"), Category(1, "cat"))
    assert [(i.id, i.file_name, i.width, i.height) for i in dataset.images] == [
        *[(1, "a.jpg", 40, 20), (2, "empty.bmp", 10, 50), (3, "sub/c.png", 100, 100)]
    ]
    a, empty, c = dataset.images
    np.testing.assert_allclose(a.boxes_xyxy, [[0, 0, 40, 20], [8, 8, 12, 12]], atol=1e-5)
    assert (a.labels.tolist(), a.crowd.tolist()) == ([0, 1], [False, False])
    assert empty.boxes_xyxy.shape == (0, 4)
    np.testing.assert_allclose(c.boxes_xyxy, [[10, 10, 30, 50]], atol=1e-5)
    np.testing.assert_allclose(c.area, [800], rtol=1e-5)
    assert [a.annotation_ids, c.annotation_ids] == [[1, 2], [3]]


def test_shards_of_it_verify(yolo, tmp_path):
    manifest, report = shard_dataset(yolo.read(), tmp_path / "out", progress=False)
    assert (manifest.samples, manifest.boxes, report.summary()) == (3, 3, [])
    assert verify(tmp_path / "out", progress=False) == []


def test_images_may_be_chosen(yolo, tmp_path):
    chosen = tmp_path / "train.txt"
    chosen.write_text("./images/sub/c.png\n./images/empty.bmp\n")
    dataset = yolo.read(chosen=chosen)
    assert [image.file_name for image in dataset.images] == ["empty.bmp", "sub/c.png"]
    chosen.write_text("./images/sub/c.png\n./images/gone.bmp\n")
    findings = Findings()
    assert len(yolo.read(findings, chosen=chosen).images) == 1
    assert (findings.images, findings.count("image_missing")) == (2, 1)


# what a.txt becomes, kind, part of the sentence, boxes that are left of its one and the other
BAD = {
    "three numbers": ("0 0.5 0.5 0.1", "box_values", "line 1: '0 0.5 0.5 0.1'", 1),
    "words": ("0 0.5 0.5 x 0.1", "box_values", "line 1", 1),
    "NaN": ("0 nan 0.5 0.1 0.1", "box_values", "line 1", 1),
    "five numbers": ("0 0.5 0.5 0.1 0.1 0.9", "box_values", "line 1", 1),
    "class of text": ("dog 0.5 0.5 0.1 0.1", "annotation_entry", "the class is 'dog'", 1),
    "unknown class": ("\n2 0.5 0.5 0.1 0.1", "unknown_category", "line 2: unknown class 2", 1),
    "class below 0": ("-1 0.5 0.5 0.1 0.1", "unknown_category", "unknown class -1", 1),
    "negative": ("0 0.5 0.5 -0.1 0.1", "box_negative", "line 1: '0 0.5 0.5 -0.1 0.1' has a neg", 1),
    "pixels": ("0 320 240 50 60", "box_outside", "has no area inside the 40x20 image", 1),
    "over the border": ("0 0.9 0.5 0.4 0.1", "box_clipped", "reaches 4.0 px outside", 2),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_right(yolo, name):
    text, kind, part, boxes = BAD[name]
    yolo.write("a", text)
    findings = Findings()
    dataset = yolo.read(findings)
    assert (len(dataset.images), sum(len(i.labels) for i in dataset.images)) == (3, boxes)
    assert list(findings.cases) == [kind]
    (sentence,) = findings.cases[kind].examples
    assert str(yolo.labels / "a.txt") in sentence and part in sentence and sentence.endswith(".")
    with pytest.raises(DataError) as caught:
        yolo.read()
    assert str(caught.value) == sentence


def test_a_box_without_area_passes_strict_as_well(yolo):
    yolo.write("a", "0 0.5 0.5 0 0.1")
    assert yolo.read().findings.count("box_empty") == 1


def test_bad_files(yolo):
    (yolo.images / "a.jpg").write_text("<html>")
    yolo.write("gone", "0 0.5 0.5 0.1 0.1")
    (yolo.labels / "sub" / "c.txt").write_bytes(b"\xff\xfe0")
    picture((9, 9), 0).convert("P").save(yolo.images / "moving.jpg", format="GIF")
    findings = Findings()
    assert [image.file_name for image in yolo.read(findings).images] == ["empty.bmp"]
    kinds = {kind: case.count for kind, case in findings.cases.items()}
    assert kinds == {"image_missing": 1, "image_damaged": 1, "label_file": 1, "image_format": 1}
    assert findings.images == 5
    picture((9, 9), 0).save(yolo.images / "a.png")
    with pytest.raises(DataError, match=r"the label file of two images 'a.txt' is given 2 times"):
        yolo.read(Findings())


def test_class_files(tmp_path):
    def names(file_name: str, text: str) -> list[str]:
        (tmp_path / file_name).write_text(text)
        return read_class_names(tmp_path / file_name)

    assert names("c.txt", "dog\r\n cat \n\n") == ["dog", "cat"]
    assert names("c.yaml", "nc: 2\nnames: [dog, cat]\n") == ["dog", "cat"]
    assert names("c.yml", "names:\n  1: cat\n  0: dog\n") == ["dog", "cat"]
    for file_name, text, part in (
        ("c.txt", "", "names no class"),
        ("c.txt", "dog\n\ncat\n", "the name of class 1 is ''"),
        ("c.txt", "dog\ndog\n", "the class name 'dog' is given 2 times"),
        ("c.yaml", "names: {0: a, 2: b}", r"names has the numbers \[0, 2\]"),
        ("c.yaml", "names: 7", "names is 7"),
        ("c.yaml", "[", "is not valid YAML"),
        ("c.yaml", "names: [no, 1]", "the name of class 0 is False"),
    ):
        with pytest.raises(DataError, match=part):
            names(file_name, text)
    with pytest.raises(DataError, match=r"absent.txt: the class names can't be read"):
        read_class_names(tmp_path / "absent.txt")


def test_options_that_a_format_lacks(yolo, tmp_path):
    with pytest.raises(DataError, match=r"YOLO labels have no class names; .* with --classes"):
        read_dataset("yolo", yolo.labels, yolo.images)
    with pytest.raises(DataError, match=r"--classes .*classes.txt: a COCO file says so itself"):
        read_dataset("coco", tmp_path / "x.json", yolo.images, classes=yolo.classes)
    assert len(read_dataset("yolo", yolo.labels, yolo.images, yolo.classes).images) == 3


def test_coco_written_as_yolo_reads_as_before(datasets, tmp_path):
    """Real boxes, in six digits as YOLOv5 writes them: to a thousandth of a pixel."""
    folder = datasets / "coco_mini"
    coco = read_coco(folder / "instances_val.json", folder / "images" / "val")
    for image in coco.images:
        size = np.tile([image.width, image.height], 2)
        x1, y1, x2, y2 = (image.boxes_xyxy / size).T
        boxes = np.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), axis=1)
        lines = [
            f"{label} " + " ".join(f"{value:.6f}" for value in box)
            for label, box in zip(image.labels.tolist(), boxes, strict=True)
        ]
        path = (tmp_path / image.file_name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text(f"names: {[c.name for c in coco.categories]}")
    yolo = read_yolo(tmp_path, folder / "images" / "val", tmp_path / "data.yaml")
    assert [c.name for c in yolo.categories] == [c.name for c in coco.categories]
    theirs = {image.file_name: image for image in coco.images}
    assert len(yolo.images) == len(coco.images)
    for image in yolo.images:
        np.testing.assert_array_equal(image.labels, theirs[image.file_name].labels)
        np.testing.assert_allclose(
            image.boxes_xyxy, theirs[image.file_name].boxes_xyxy, atol=1.5e-3
        )


part = st.floats(0.01, 0.99)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(boxes=st.lists(st.tuples(part, part, part, part), min_size=1, max_size=5))
def test_yolo_boxes_round_trip(tmp_path_factory, boxes):
    """Corners in pixels → parts of the image → the same corners."""
    folder = tmp_path_factory.mktemp("yolo")
    picture((64, 48), 0).save(folder / "p.png")
    (folder / "classes.txt").write_text("thing")
    size = np.array([64, 48, 64, 48])
    corners = np.array([(min(a, c), min(b, d), max(a, c) + 0.01, max(b, d) + 0.01)
                        for a, b, c, d in boxes])  # fmt: skip
    lines = [
        f"0 {(a + c) / 2!r} {(b + d) / 2!r} {c - a!r} {d - b!r}" for a, b, c, d in corners.tolist()
    ]
    (folder / "p.txt").write_text("\n".join(lines))
    (image,) = read_yolo(folder, folder, folder / "classes.txt").images
    np.testing.assert_allclose(image.boxes_xyxy, corners * size, atol=1e-4)
