from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.checks import check_boxes
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.findings import Findings
from convnext_yolo.data_prep.formats import Category, read_coco

Document = dict[str, Any]


def assert_sentence(text: str) -> None:
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 600


def test_records_are_what_the_file_says(coco_files):
    dataset = coco_files.read()
    assert dataset.categories == (Category(3, "dog"), Category(9, "cat"))
    assert [image.id for image in dataset.images] == [0, 12, 31, 70, 500000000001]
    assert dataset.findings.cases == {}

    a = next(image for image in dataset.images if image.id == 70)
    assert (a.file_name, a.path, a.width, a.height) == ("a.jpg", coco_files.image(0), 48, 32)
    np.testing.assert_array_equal(
        a.boxes_xyxy, np.array([[1, 2, 31.5, 22.25], [10.1, 10.2, 15.4, 15.6]], np.float32)
    )
    assert a.boxes_xyxy.dtype == np.float32
    assert a.labels.tolist() == [1, 0]
    assert a.labels.dtype == np.int64
    assert a.crowd.tolist() == [False, False]
    assert a.crowd.dtype == bool
    np.testing.assert_allclose(a.area, [400.5, 5.3 * 5.4], rtol=1e-5)
    assert a.area.dtype == np.float32
    assert a.annotation_ids == [1, 3]

    b = next(image for image in dataset.images if image.id == 12)
    assert b.crowd.tolist() == [True]
    assert b.area.tolist() == [32 * 48]


def test_images_without_annotations_are_kept(coco_files):
    coco_files.document["annotations"] = []
    dataset = coco_files.read()
    assert len(dataset.images) == 5
    for image in dataset.images:
        assert image.boxes_xyxy.shape == (0, 4)
        assert image.labels.shape == image.crowd.shape == image.area.shape == (0,)
        assert image.annotation_ids == []


def test_the_order_of_the_lists_does_not_matter(coco_files):
    first = coco_files.read()
    for key in ("images", "categories"):
        coco_files.document[key].reverse()
    second = coco_files.read()
    assert first.categories == second.categories
    for one, other in zip(first.images, second.images, strict=True):
        assert (one.id, one.annotation_ids) == (other.id, other.annotation_ids)
        np.testing.assert_array_equal(one.boxes_xyxy, other.boxes_xyxy)


def test_a_box_over_the_border_by_one_pixel_is_clipped_and_counted(coco_files):
    boxes = [[-1, -1, 20, 20], [28, 12, 21, 21], [0, 0, 48.001, 32]]  # the last is rounding
    coco_files.document["annotations"] = [
        {"id": i, "image_id": 70, "category_id": 9, "bbox": box} for i, box in enumerate(boxes)
    ]
    dataset = coco_files.read()
    assert dataset.findings.count("box_rounded") == 2
    image = dataset.images[3]
    assert image.boxes_xyxy.tolist() == [[0, 0, 19, 19], [28, 12, 48, 32], [0, 0, 48, 32]]
    assert image.area.tolist() == [19 * 19, 20 * 20, 48 * 32]  # of what is left


def test_a_box_without_area_is_dropped_and_counted(coco_files):
    coco_files.document["annotations"][0]["bbox"] = [10, 2, 3, 0]  # COCO train2017 has such
    dataset = coco_files.read()
    assert dataset.findings.count("box_empty") == 1
    assert dataset.images[3].annotation_ids == [3]


def set_in(list_name: str, position: int, **values: Any) -> Callable[[Document], None]:
    return lambda document: document[list_name][position].update(values)


def drop_from(list_name: str, position: int, key: str) -> Callable[[Document], None]:
    return lambda document: document[list_name][position].pop(key)


def append_to(list_name: str, *entries: Any) -> Callable[[Document], None]:
    return lambda document: document[list_name].extend(entries)


def whole(list_name: str, value: Any) -> Callable[[Document], None]:
    return lambda document: document.update({list_name: value})


def bbox(*numbers: Any) -> Callable[[Document], None]:
    return set_in("annotations", 0, bbox=list(numbers))


BAD = {
    "no images key": (lambda d: d.pop("images"), ["images is missing", "instances.json"]),
    "annotations no list": (whole("annotations", {}), ["annotations is not a list"]),
    "categories no list": (whole("categories", None), ["categories is not a list"]),
    "empty image list": (whole("images", []), ["images is empty"]),
    "empty categories": (whole("categories", []), ["categories is empty"]),
    "category no object": (append_to("categories", 7), ["categories[2]", "7", "not an object"]),
    "category no name": (drop_from("categories", 0, "name"), ["categories[0]", "name is None"]),
    "category id twice": (
        append_to("categories", {"id": 9, "name": "cow"}),
        ["category id 9", "2 times"],
    ),
    "category name twice": (
        append_to("categories", {"id": 10, "name": "cat"}),
        ["category name 'cat'", "2 times"],
    ),
    "image no object": (append_to("images", "x.jpg"), ["images[5]", "not an object"]),
    "image no id": (drop_from("images", 1, "id"), ["images[1]", "id is missing"]),
    "image id text": (set_in("images", 1, id="12"), ["images[1]", "id is '12'", "whole number"]),
    "image id negative": (set_in("images", 1, id=-1), ["id is -1"]),
    "image id beyond int64": (set_in("images", 1, id=2**63), ["images[1]", str(2**63)]),
    "image id twice": (set_in("images", 1, id=70), ["image id 70", "2 times"]),
    "file name twice": (set_in("images", 1, file_name="a.jpg"), ["file_name 'a.jpg'", "2 times"]),
    "file name twice, in disguise": (
        set_in("images", 1, file_name="sub/./c.png"),
        ["file_name 'sub/c.png'", "2 times"],
    ),
    "file name missing": (drop_from("images", 1, "file_name"), ["image 12", "file_name is None"]),
    "file name with a zero byte": (set_in("images", 1, file_name="a\0.jpg"), ["image 12"]),
    "file name a folder": (set_in("images", 2, file_name="sub"), ["image 'sub'", "is not in"]),
    "file name no folder": (set_in("images", 2, file_name="a.jpg/c.png"), ["is not in"]),
    "file name not encodable": (set_in("images", 2, file_name="\ud800/c.png"), ["is not in"]),
    "path upwards": (
        set_in("images", 1, file_name="../instances.json"),
        ["image 12", "'../instances.json' leaves the image folder"],
    ),
    "path absolute": (set_in("images", 1, file_name="/etc/passwd"), ["leaves the image folder"]),
    "image file missing": (
        set_in("images", 2, file_name="sub/gone.png"),
        ["instances.json", "'sub/gone.png' is not in", "images", "image folder"],
    ),
    "two image files missing": (
        lambda d: [i.update(file_name=f"no-{i['id']}.jpg") for i in d["images"][:2]],
        ["'no-70.jpg' is not in", "(and 1 more like it)"],
    ),
    "width missing": (drop_from("images", 0, "width"), ["image 70", "width is missing"]),
    "height null": (set_in("images", 0, height=None), ["image 70", "height is None"]),
    "height zero": (set_in("images", 0, height=0), ["image 70", "height is 0", "pixels"]),
    "width fractional": (set_in("images", 0, width=47.5), ["width is 47.5"]),
    "width true": (set_in("images", 0, width=True), ["width is True"]),
    "annotation no object": (append_to("annotations", []), ["annotations[5]", "not an object"]),
    "annotation no id": (drop_from("annotations", 0, "id"), ["annotations[0]", "id is missing"]),
    "annotation id twice": (set_in("annotations", 0, id=2), ["annotation id 2", "2 times"]),
    "annotation of no image": (
        set_in("annotations", 2, image_id=71),
        ["annotation 3", "image_id 71", "remove the annotation"],
    ),
    "unknown category": (
        set_in("annotations", 2, category_id=4),
        ["annotation 3", "unknown category_id 4", "add the category"],
    ),
    "category id missing": (drop_from("annotations", 2, "category_id"), ["category_id is missing"]),
    "box missing": (drop_from("annotations", 0, "bbox"), ["annotation 1", "bbox is missing"]),
    "box of three": (bbox(1, 2, 3), ["annotation 1", "bbox is [1, 2, 3]", "four"]),
    "box of text": (bbox("1", "2", "3", "4"), ["annotation 1", "four finite numbers"]),
    "box of nan": (bbox(float("nan"), 2, 3, 4), ["annotation 1", "nan", "finite"]),
    "box of inf": (bbox(1, 2, float("inf"), 4), ["annotation 1", "inf", "finite"]),
    "box of a huge integer": (bbox(1, 2, 10**400, 4), ["annotation 1", "finite"]),
    "box of negative width": (bbox(10, 2, -3, 4), ["annotation 1", "[10, 2, -3, 4]", "negative"]),
    "box of no area in float32": (bbox(30, 2, 1e-9, 3), ["annotation 1", "has no area inside"]),
    "box on the border": (bbox(48, 2, 0.5, 3), ["annotation 1", "has no area inside", "48x32"]),
    "box outside": (
        bbox(20, 2, 30, 4),
        ["annotation 1", "'a.jpg'", "[20, 2, 30, 4]", "2.0 px outside the 48x32 image", "correct"],
    ),
    "box outside on the left": (bbox(-1.5, 2, 30, 4), ["1.5 px outside"]),
    "two boxes outside": (
        lambda d: [a.update(bbox=[0, 0, 99, 99]) for a in d["annotations"][2:4]],
        ["annotation 3", "(and 1 more like it)"],
    ),
    "crowd of two": (set_in("annotations", 0, iscrowd=2), ["annotation 1", "iscrowd is 2"]),
    "area negative": (set_in("annotations", 0, area=-1), ["annotation 1", "area is -1"]),
    "area nan": (set_in("annotations", 0, area=float("nan")), ["annotation 1", "area is nan"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_sentence(coco_files, case):
    spoil, parts = BAD[case]
    spoil(coco_files.document)
    with pytest.raises(DataError) as caught:
        coco_files.read()
    text = str(caught.value)
    assert_sentence(text)
    assert str(coco_files.annotations) in text
    for part in parts:
        assert part in text
    assert caught.value.exit_code == 2


BAD_FILES = {
    "not json": (b"{", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "not text": (b"\xff\xfe\x00\xd8", "not valid JSON"),
    "nested": (b"[" * 200_000, "not valid JSON"),
    "results": (b"[]", "not a results file"),
    "number": (b"3", "holds a JSON int"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_not_coco(tmp_path, case):
    content, part = BAD_FILES[case]
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=part) as caught:
        read_coco(path, tmp_path)
    assert_sentence(str(caught.value))


def test_paths_that_are_not_there(coco_files, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.json: .*No such file"):
        read_coco(tmp_path / "nowhere.json", tmp_path)
    with pytest.raises(DataError, match="Is a directory"):
        read_coco(tmp_path, tmp_path)
    coco_files.annotations.write_text(json.dumps(coco_files.document))
    with pytest.raises(DataError, match=r"nowhere: no such image folder; give the folder of inst"):
        read_coco(coco_files.annotations, tmp_path / "nowhere")


def test_a_linked_image_counts_and_a_broken_link_does_not(coco_files, tmp_path):
    target = tmp_path / "elsewhere.jpg"
    coco_files.image(0).rename(target)
    coco_files.image(0).symlink_to(target)
    assert len(coco_files.read().images) == 5
    target.unlink()
    with pytest.raises(DataError, match=r"'a.jpg' is not in"):
        coco_files.read()


numbers = st.floats(-50, 150, width=32)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=8), st.booleans())
def test_boxes_are_inside_their_image_or_refused(boxes, strict):
    xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    sizes = np.full((len(boxes), 2), (100, 80), dtype=np.float64)
    try:
        xyxy, good, cut = check_boxes(xywh, sizes, lambda m: f"box {m}", Findings(strict))
    except DataError as error:
        assert_sentence(str(error))
        assert strict
        return
    xyxy, xywh, sizes, cut = xyxy[good], xywh[good], sizes[good], cut[good]
    assert (xyxy[:, :2] >= 0).all()
    assert (xyxy[:, 2:] <= sizes).all()
    assert (xyxy[:, :2] < xyxy[:, 2:]).all()
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    assert np.abs(xyxy - corners)[~cut].max(initial=0) <= 1.0001
    assert (np.abs(xyxy - corners)[cut].max(axis=1) > 1).all()
    assert not (strict and cut.any())


def test_real_coco_boxes_pass(shared_data):
    """val2014 has boxes in hundredths of pixels, crowds and images without objects."""
    document = json.loads((shared_data / "cocoeval" / "instances_val2014_100.json").read_text())
    sizes = {i["id"]: (i["width"], i["height"]) for i in document["images"]}
    annotations = document["annotations"]
    xyxy, good, _ = check_boxes(
        np.array([a["bbox"] for a in annotations], dtype=np.float64),
        np.array([sizes[a["image_id"]] for a in annotations], dtype=np.float64),
        lambda m: f"annotation {annotations[m]['id']}",
        Findings(strict=True),
    )
    assert good.all()
    assert len(xyxy) == len(annotations) > 800


@pytest.mark.parametrize(
    ("name", "part", "images", "classes"),
    [("bccd", "train", 292, 3), ("bccd", "val", 72, 3), ("coco_mini", "train", 64, 80)],
)
def test_bundled_data_passes(datasets: Path, name, part, images, classes):
    folder = datasets / name
    dataset = read_coco(folder / f"instances_{part}.json", folder / "images" / part)
    assert (len(dataset.images), len(dataset.categories)) == (images, classes)
