"""The pieces of HTML: well-formed, escaped, saying what is so."""

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from convnext_yolo.demo import page
from convnext_yolo.demo.images import PictureError
from convnext_yolo.model.weights import WeightsInfo

NASTY = "<script>alert('\"&')</script>"


def info(*names: str, **more: Any) -> WeightsInfo:
    classes = tuple({"id": i, "name": name} for i, name in enumerate(names))
    return WeightsInfo(
        {"name": "convnext_yolo", "backbone": {"name": NASTY}}, classes, (192, 256), **more
    )


def words(html: str) -> str:
    return " ".join("".join(ET.fromstring(html).itertext()).split())


def test_masthead_names_model_step_and_classes() -> None:
    html = page.masthead(info("cat", NASTY, step=12000, metrics={"AP": 0.5, "AP50": "?"}))
    assert "<script" not in html
    for fact in (NASTY, "12,000", f"cat, {NASTY}", "256 × 192 px", "AP 0.500"):
        assert fact in words(html)
    assert "AP50" not in words(html)
    assert "Validation" not in words(page.masthead(info("cat")))


def test_masthead_folds_many_classes() -> None:
    html = page.masthead(info(*[f"thing {i}" for i in range(80)]))
    assert ET.fromstring(html).findtext(".//summary") == "80 classes"
    assert "thing 79" in words(html)


def test_refusal_is_escaped_and_announced() -> None:
    root = ET.fromstring(page.refused_stage(str(PictureError(f"{NASTY}: no."))))
    assert root.get("role") == "alert"
    assert f"{NASTY}: no." in "".join(root.itertext())


def test_picture_says_in_words_what_it_shows() -> None:
    alt = page.picture_words(NASTY, [2, 0, 1], ["cat", "dog", NASTY])
    assert alt == f"{NASTY} with 2 cat, 1 {NASTY} in boxes"
    assert page.picture_words("a.png", [0], ["cat"]) == "a.png, nothing found in it"
    html = page.picture_stage("gradio_api/file=/tmp/x.jpg", 20, 10, "<svg/>", alt)
    image = ET.fromstring(html.replace('height="10">', 'height="10"/>')).find("img")
    assert image is not None and image.get("alt") == alt


def test_counts_of_few_classes_show_zeros_too() -> None:
    html = page.counts_table([2, 0], ["cat", NASTY], 0.25, 0.9)
    rows = ET.fromstring(html).findall(".//tbody/tr")
    assert [row.findtext("td") for row in rows] == ["2", "0"]
    assert words(html).startswith("2 boxes found")
    assert words(page.counts_table([1], ["cat"], 0.25, 0.9)).startswith("1 box found")


def test_counts_of_many_classes_show_those_found_most_first() -> None:
    counts = [0] * 80
    counts[7], counts[70] = 1, 5
    html = page.counts_table(counts, [f"thing {i}" for i in range(80)], 0.25, 0.9)
    names = ["".join(th.itertext()) for th in ET.fromstring(html).findall(".//tbody/tr/th")]
    assert names == ["thing 70", "thing 7"]


@pytest.mark.parametrize(
    ("best", "hint"), [(0.2, "surest guess has 0.20: lower"), (0.0, "no guess at all")]
)
def test_nothing_found_says_what_can_be_done(best: float, hint: str) -> None:
    text = words(page.counts_table([0], ["cat"], 0.25, best))
    assert text.startswith("Nothing found above confidence 0.25.") and hint in text
