"""The page in a real browser, on the real server."""

import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convnext_yolo.demo.images import load_picture
from convnext_yolo.demo.overlay import class_colour
from convnext_yolo.model.predictor import Predictor

from .conftest import CLASSES, NASTY, Server

pytestmark = [pytest.mark.browser, pytest.mark.process]

BOXES = ".overlay .box"
PHONE = {"width": 390, "height": 844}


def upload(page: Any, *files: Any) -> None:
    page.set_input_files("input[type=file]", *files)


def wait_for_boxes(page: Any, other_than: int = 0) -> int:
    page.wait_for_function(
        "([boxes, before]) => ![0, before].includes(document.querySelectorAll(boxes).length)",
        arg=[BOXES, other_than],
    )
    count: int = page.locator(BOXES).count()
    return count


def total(page: Any) -> int:
    return int(page.locator(".counts .total").inner_text().split()[0])


def move(page: Any, slider: str, value: float) -> None:
    field = page.locator(f"#{slider} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def test_says_what_the_model_is(open_page: Any) -> None:
    page, _ = open_page()
    words = page.locator("#masthead").inner_text()
    for fact in ("test_convnext", "1,234", *CLASSES, "320 × 320 px", "AP 0.500"):
        assert fact in words
    assert page.title() == "ConvNeXt-YOLO"
    assert page.get_by_role("button", name="Save picture").is_disabled()


def test_upload_shows_boxes_and_counts(open_page: Any, picture_file: Path) -> None:
    page, _ = open_page()
    upload(page, picture_file)
    boxes = wait_for_boxes(page)
    assert total(page) == boxes
    rows = [row.inner_text().split("\t") for row in page.locator(".counts tbody tr").all()]
    assert [name.strip() for name, _ in rows] == list(CLASSES)
    assert sum(int(count) for _, count in rows) == boxes
    image = page.locator(".picture img")
    alt = image.get_attribute("alt")
    assert alt.startswith("patches.png with ") and f"{rows[0][1]} RBC" in alt
    page.wait_for_function("document.querySelector('.picture img').naturalWidth == 320")
    picture, overlay = image.bounding_box(), page.locator(".overlay").bounding_box()
    assert all(abs(picture[key] - overlay[key]) < 1 for key in picture)  # boxes lie on the picture
    assert picture["width"] / picture["height"] == pytest.approx(320 / 240, rel=0.01)


def test_sliders_filter_without_the_network(
    open_page: Any, server: Server, picture_file: Path
) -> None:
    page, watch = open_page()
    before = server.passes()
    upload(page, picture_file)
    boxes = wait_for_boxes(page)
    assert server.passes() == before + 1
    page.evaluate("document.querySelector('.picture img').sameAsBefore = true")
    watch.requests.clear()
    move(page, "confidence", 0.4)
    fewer = wait_for_boxes(page, other_than=boxes)
    assert fewer < boxes
    move(page, "confidence", 0.25)
    assert wait_for_boxes(page, other_than=fewer) == boxes
    move(page, "iou", 0.95)
    more = wait_for_boxes(page, other_than=boxes)
    assert more > boxes
    page.get_by_text(f"{more} boxes found").wait_for()
    assert server.passes() == before + 1  # no second pass
    assert page.evaluate("document.querySelector('.picture img').sameAsBefore")
    assert not [url for url in watch.requests if "/file=" in url]  # nor is the picture sent again


def test_nothing_found_says_so(open_page: Any, picture_file: Path) -> None:
    page, _ = open_page()
    upload(page, picture_file)
    wait_for_boxes(page)
    move(page, "confidence", 0.99)
    words = page.locator(".nothing").inner_text()
    assert re.search(
        r"Nothing found above confidence 0\.99\.\s+The surest guess has 0\.\d\d", words
    )
    assert page.locator(BOXES).count() == 0
    assert page.locator(".picture img").get_attribute("alt") == "patches.png, nothing found in it"


def test_saves_what_is_seen(open_page: Any, picture_file: Path, tmp_path: Path) -> None:
    page, _ = open_page()
    photo = tmp_path / "photo.jpg"
    Image.open(picture_file).convert("RGB").save(photo, quality=95)
    move(page, "confidence", 0.5)
    for file, kind in ((picture_file, "PNG"), (photo, "JPEG")):
        upload(page, file)
        page.wait_for_selector(f"img[alt^='{file.name} with']")
        with page.expect_download() as download:
            page.get_by_role("button", name="Save picture").click()
        assert download.value.suggested_filename == f"{file.stem}-boxes{file.suffix}"
        saved = Image.open(download.value.path())
        assert saved.format == kind and saved.size == (320, 240)
        drawn = np.abs(
            np.asarray(saved.convert("RGB")).astype(int) - Image.open(file).convert("RGB")
        )
        assert (drawn.max(-1) > 40).sum() > 300  # something is drawn
    with page.expect_download() as download:
        page.get_by_role("button", name="Save COCO JSON").click()
    assert download.value.suggested_filename == "photo-coco.json"
    document = json.loads(Path(download.value.path()).read_text())
    assert document["images"] == [{"id": 1, "file_name": "photo.jpg", "width": 320, "height": 240}]
    assert [category["name"] for category in document["categories"]] == list(CLASSES)
    assert len(document["annotations"]) == page.locator(BOXES).count()
    assert document["info"]["confidence"] == 0.5
    for annotation in document["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert 0 <= x <= x + width <= 320.01 and 0 <= y <= y + height <= 240.01
        assert annotation["score"] > 0.5 and annotation["category_id"] in (10, 20, 30, 40)


def test_labels_are_text_and_nothing_else(open_page: Any, picture_file: Path) -> None:
    page, _ = open_page()
    upload(page, picture_file)
    wait_for_boxes(page)
    labels = page.locator(".overlay .label text").all_text_contents()
    assert any(label.startswith(NASTY[:23]) for label in labels), labels
    assert page.locator("#stage b, #counts b, #masthead b").count() == 0
    nasty = page.locator(".counts tbody tr").nth(3)
    assert nasty.locator("th").inner_text().strip() == NASTY
    swatch = nasty.locator(".swatch").evaluate("e => getComputedStyle(e).backgroundColor")
    red, green, blue = bytes.fromhex(class_colour(3)[1:])
    assert swatch == f"rgb({red}, {green}, {blue})"


def test_bad_files_give_a_sentence_and_the_page_goes_on(open_page: Any, picture_file: Path) -> None:
    page, _ = open_page()
    bad = {
        "letter.jpg": (b"dear reader", "not a picture"),
        "empty.png": (b"", "empty (0 bytes)"),
        "cut.png": (picture_file.read_bytes()[:300], "damaged or cut off"),
        "<img src=x onerror=alert(1)>.png": (b"x", "not a picture"),
    }
    for name, (content, reason) in bad.items():
        upload(page, {"name": name, "mimeType": "image/png", "buffer": content})
        page.wait_for_function(
            "reason => document.querySelector('.refusal')?.innerText.includes(reason)", arg=reason
        )
        words = page.locator(".refusal").inner_text()
        assert "Traceback" not in words and page.locator(".refusal img").count() == 0
        assert page.get_by_role("alert").count() >= 1
        assert page.get_by_role("button", name="Save picture").is_disabled()
        upload(page, picture_file)
        wait_for_boxes(page)


def test_a_failing_model_gives_a_sentence(open_page: Any, picture_file: Path) -> None:
    page, _ = open_page()
    buffer = BytesIO()
    Image.new("RGB", (13, 13)).save(buffer, "PNG")
    upload(page, {"name": "unlucky.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    assert "the model failed on this picture" in page.locator(".refusal").inner_text()
    upload(page, picture_file)
    wait_for_boxes(page)


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_pictures_can_be_dropped_and_pasted(open_page: Any, picture_file: Path, event: str) -> None:
    page, _ = open_page()
    page.evaluate(
        """([event, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "given.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true};
            const made = event === "drop"
                ? new DragEvent("drop", {...options, dataTransfer: data})
                : new ClipboardEvent("paste", {...options, clipboardData: data});
            document.querySelector(".invitation").dispatchEvent(made);
        }""",
        [event, list(picture_file.read_bytes())],
    )
    wait_for_boxes(page)
    assert page.locator(".picture img").get_attribute("alt").startswith("given.png with")


def test_works_from_the_keyboard(open_page: Any, picture_file: Path, weights: Path) -> None:
    page, _ = open_page()
    page.on("filechooser", lambda _: None)  # Playwright now catches every one from the start
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first example
    page.wait_for_selector("img[alt^='smear-1.jpg']")
    page.keyboard.press("Shift+Tab")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(picture_file)
    page.wait_for_selector("img[alt^='patches.png with']")
    slider = page.locator("#confidence input[type=range]")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    (expected,) = Predictor.load(weights)([load_picture(picture_file)], 0.45, 0.45)
    page.wait_for_function(  # the last value wins
        "([boxes, count]) => document.querySelectorAll(boxes).length == count",
        arg=[BOXES, len(expected)],
    )
    assert slider.input_value() == "0.45"


def test_users_do_not_see_each_other(open_page: Any, picture_file: Path, tmp_path: Path) -> None:
    first, _ = open_page()
    second, _ = open_page()
    other = tmp_path / "other.png"
    Image.open(picture_file).rotate(180).crop((0, 0, 200, 240)).save(other)
    upload(first, picture_file)
    upload(second, other)
    boxes = [wait_for_boxes(page) for page in (first, second)]
    move(second, "confidence", 0.5)
    wait_for_boxes(second, other_than=boxes[1])
    assert first.locator(BOXES).count() == boxes[0]
    move(first, "iou", 0.9)
    wait_for_boxes(first, other_than=boxes[0])
    assert first.locator("img[alt^='patches.png']").count() == 1
    assert second.locator("img[alt^='other.png']").count() == 1
    sources = [page.locator(".picture img").get_attribute("src") for page in (first, second)]
    assert sources[0] != sources[1]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".bmp", ".tiff"])
def test_formats_that_browsers_cannot_all_show(
    open_page: Any, picture_file: Path, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"picture{suffix}"
    Image.open(picture_file).save(path)
    page, _ = open_page()
    upload(page, path)
    wait_for_boxes(page)
    page.wait_for_function("document.querySelector('.picture img').naturalWidth == 320")


def test_fits_a_phone(open_page: Any, picture_file: Path) -> None:
    page, _ = open_page(PHONE, has_touch=True, is_mobile=True)
    assert page.get_by_text("Tap to choose a picture").is_visible()
    upload(page, picture_file)
    wait_for_boxes(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for selector in (".picture", "#confidence", ".counts", "#save"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
