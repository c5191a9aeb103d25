"""The API as a user calls it, and the server's start, end and walls."""

import json
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from convnext_yolo.demo.app import bundled_examples, serve
from convnext_yolo.demo.images import load_picture
from convnext_yolo.demo.results import class_counts, coco_document
from convnext_yolo.demo.server import DemoError, usable_port
from convnext_yolo.model.errors import WeightsError
from convnext_yolo.model.predictor import Predictor

from .conftest import ARCHITECTURE, CLASSES, Server


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    from gradio_client import Client

    return Client(server.url, verbose=False)


def detect(client: Any, path: Path | str, *thresholds: float) -> dict[str, Any]:
    from gradio_client import handle_file

    answer: dict[str, Any] = client.predict(handle_file(str(path)), *thresholds, api_name="/detect")
    return answer


def refusal(client: Any, image: Any, *thresholds: Any) -> str:
    """The sentence with which the API refuses."""
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as refused:
        client.predict(image, *thresholds, api_name="/detect")
    sentence = str(refused.value)
    assert "Traceback" not in sentence and "\n" not in sentence
    return sentence


@pytest.mark.process
def test_detect_answers_as_the_predictor(client: Any, picture_file: Path, weights: Path) -> None:
    answer = detect(client, picture_file, 0.3, 0.5)
    assert answer.keys() == {"image", "detections", "model"}
    assert answer["image"] == {"width": 320, "height": 240}
    model = answer["model"]
    assert model["name"] == ARCHITECTURE["backbone"]["name"] and model["step"] == 1234
    assert [entry["name"] for entry in model["classes"]] == list(CLASSES)
    predictor = Predictor.load(weights)
    assert model["sha256"] == predictor.info.sha256
    (expected,) = predictor([load_picture(picture_file)], 0.3, 0.5)
    assert len(expected) > 3
    assert len(answer["detections"]) == len(expected)
    rows = zip(answer["detections"], expected.boxes, expected.scores, expected.labels, strict=True)
    for found, box, score, label in rows:
        assert found.keys() == {"category_id", "category", "score", "bbox"}
        assert found["category"] == CLASSES[label] and found["category_id"] == 10 * (label + 1)
        assert found["score"] == pytest.approx(score.item(), abs=1e-4)
        x, y, width, height = found["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(box.tolist(), abs=0.03)


@pytest.mark.process
def test_detect_has_defaults_and_obeys_thresholds(client: Any, picture_file: Path) -> None:
    assert detect(client, picture_file) == detect(client, picture_file, 0.25, 0.45)
    counts = [len(detect(client, picture_file, c, 0.45)["detections"]) for c in (0, 0.25, 0.4, 1)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2] > counts[3] == 0
    assert len(detect(client, picture_file, 0.25, 0.9)["detections"]) > counts[1]


@pytest.mark.process
def test_detect_is_the_only_endpoint(client: Any) -> None:
    api = client.view_api(return_format="dict")
    assert list(api["named_endpoints"]) == ["/detect"] and not api["unnamed_endpoints"]
    parameters = api["named_endpoints"]["/detect"]["parameters"]
    assert [p["parameter_name"] for p in parameters] == ["image", "confidence", "iou"]


@pytest.mark.process
def test_detect_over_plain_http(server: Server, picture_file: Path) -> None:
    """As from curl: upload, call, read the event."""
    api = server.url + "gradio_api/"
    with httpx.Client(trust_env=False, timeout=60) as http, picture_file.open("rb") as file:
        (path,) = http.post(api + "upload", files={"files": file}).json()
        image = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = http.post(api + "call/detect", json={"data": [image, 0.25, 0.45]}).json()
        lines = http.get(f"{api}call/detect/{event['event_id']}").text.splitlines()
    assert lines[0] == "event: complete"
    (answer,) = json.loads(lines[1].removeprefix("data: "))
    assert answer["image"] == {"width": 320, "height": 240} and answer["detections"]


@pytest.mark.process
def test_detect_turns_a_lying_picture_upright(client: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "phone.jpg", exif=exif)
    assert detect(client, tmp_path / "phone.jpg")["image"] == {"width": 40, "height": 60}


@pytest.mark.process
@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 2000)])
def test_detect_on_slivers(client: Any, tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "sliver.png")
    answer = detect(client, tmp_path / "sliver.png")
    assert answer["image"] == {"width": size[0], "height": size[1]}


@pytest.mark.process
def test_bad_files_are_refused_with_a_sentence(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file

    (tmp_path / "letter.jpg").write_text("dear reader")
    (tmp_path / "empty.png").touch()
    for name, reason in (("letter.jpg", "not a picture"), ("empty.png", "empty (0 bytes)")):
        assert reason in refusal(client, handle_file(str(tmp_path / name)), 0.25, 0.45)


@pytest.mark.process
def test_bad_thresholds_are_refused_with_a_sentence(client: Any, picture_file: Path) -> None:
    from gradio_client import handle_file

    image = handle_file(str(picture_file))
    assert refusal(client, image, 1.5, 0.45) == "confidence: 1.5 is not a number from 0 to 1."
    assert refusal(client, image, 0.25, "much") == "iou: 'much' is not a number from 0 to 1."


@pytest.mark.process
@pytest.mark.parametrize(
    "image",
    [
        "/etc/hostname",
        {"path": "/etc/hostname"},
        {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}},
        {"path": "http://192.0.2.1/x.jpg", "meta": {"_type": "gradio.FileData"}},
        {"path": "http://192.0.2.1/x.jpg"},
        None,
        7,
    ],
)
def test_only_uploads_are_read(server: Server, image: Any) -> None:
    api = server.url + "gradio_api/call/detect"
    with httpx.Client(trust_env=False, timeout=60) as http:
        event = http.post(api, json={"data": [image, 0.25, 0.45]}).json()
        lines = http.get(f"{api}/{event['event_id']}").text.splitlines()
    assert lines[0] == "event: error"
    assert "detections" not in lines[1] and "Traceback" not in lines[1]
    assert server.outside() == ""


@pytest.mark.process
@pytest.mark.parametrize("path", ["file=http://192.0.2.1/x", "proxy=http://192.0.2.1/x"])
def test_nothing_is_fetched_for_others(server: Server, path: str) -> None:
    answer = httpx.get(server.url + "gradio_api/" + path, trust_env=False)
    assert answer.status_code == 403
    assert server.outside() == ""


@pytest.mark.process
def test_files_of_the_machine_are_not_served(server: Server) -> None:
    for path in ("/etc/hostname", str(server.passes_file), "../passes"):
        answer = httpx.get(f"{server.url}gradio_api/file={path}", trust_env=False)
        assert answer.status_code in (403, 404)


@pytest.mark.process
def test_too_large_an_upload_is_refused(server: Server) -> None:
    big = {"files": ("big.png", bytes(65 * 2**20))}
    answer = httpx.post(server.url + "gradio_api/upload", files=big, trust_env=False, timeout=60)
    assert answer.status_code == 413 and "maximum allowed size" in answer.text


@pytest.mark.process
def test_survives_a_failing_model(client: Any, picture_file: Path, tmp_path: Path) -> None:
    from gradio_client import handle_file

    Image.new("RGB", (13, 13)).save(tmp_path / "unlucky.png")
    sentence = refusal(client, handle_file(str(tmp_path / "unlucky.png")), 0.25, 0.45)
    assert sentence == (
        "unlucky.png: the model failed on this picture (RuntimeError: no kernel image is "
        "available); the server's log says more."
    )
    assert detect(client, picture_file)["detections"]


@pytest.mark.process
def test_many_callers_get_their_own_answers(client: Any, tmp_path: Path) -> None:
    widths = range(100, 112)
    for width in widths:
        Image.new("RGB", (width, 50)).save(tmp_path / f"{width}.png")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda width: detect(client, tmp_path / f"{width}.png"), widths))
    assert [answer["image"]["width"] for answer in answers] == list(widths)


@pytest.mark.process
def test_ends_on_ctrl_c_and_keeps_the_port_to_loopback(
    start_server: Callable[[Path], Server], tmp_path: Path, weights: Path
) -> None:
    running = start_server(tmp_path)
    port = int(running.url.rsplit(":", 1)[1].strip("/"))
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port)}
    for address in addresses - {"127.0.0.1", "127.0.1.1", "::1"}:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            assert probe.connect_ex((address, port)) != 0
    with pytest.raises(DemoError, match=f"port {port} is in use"):
        serve(weights, port)
    assert running.stop(signal.SIGINT) == 0
    assert "Traceback" not in "".join(running.log)
    assert running.outside() == ""
    assert not list(tmp_path.glob("convnext-yolo-demo-*"))  # pictures of users are gone
    assert usable_port(port) == port


@pytest.mark.process
def test_browser_may_load_from_this_server_only(server: Server) -> None:
    answer = httpx.get(server.url, trust_env=False)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self' data: blob:;")
    assert "http" not in policy and "*" not in policy
    assert "access-control-allow-origin" not in answer.headers


def test_mistakes_at_the_start_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        serve(tmp_path / "missing.safetensors")
    with pytest.raises(DemoError, match="not from 0 to 65535"):
        usable_port(70_000)
    assert DemoError.exit_code == 2
    monkeypatch.setattr("convnext_yolo.demo.app.find_spec", lambda _: None)
    with pytest.raises(DemoError, match=r"needs gradio: pip install"):
        serve(tmp_path / "model.safetensors")
    assert usable_port(0) != 0 and usable_port(None) != 0


def test_examples_are_shown_where_they_make_sense() -> None:
    assert len(bundled_examples(["WBC", "RBC", "Platelets"])) == 4
    assert not bundled_examples(["person", "car"])
    for path in bundled_examples(CLASSES):
        assert load_picture(path).shape == (480, 640, 3)
        assert path.stat().st_size < 100_000


def test_coco_document_is_read_by_pycocotools(
    picture_file: Path, weights: Path, tmp_path: Path
) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    predictor = Predictor.load(weights)
    (found,) = predictor([load_picture(picture_file)])
    document = coco_document(found, "patches.png", (320, 240), predictor.info, 0.25, 0.45)
    path = tmp_path / "found.json"
    path.write_text(json.dumps(document))
    loaded = coco.COCO(path)
    assert len(loaded.getAnnIds(imgIds=[1])) == len(found) > 0
    for index, count in enumerate(class_counts(found, len(CLASSES)), 1):
        assert len(loaded.getAnnIds(catIds=[10 * index])) == count
    assert document["info"]["confidence"] == 0.25
