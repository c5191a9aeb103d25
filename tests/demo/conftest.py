"""A tiny detector that finds boxes everywhere, the real server on it, and a real browser."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.letterbox import letterbox
from convnext_yolo.model.weights import WeightsInfo, save_weights

# The last one is what a label must never be taken for: markup, and templates of both of Gradio's
# kinds.
NASTY = "<b onclick=alert(1)>${1+1}{{value}}</b>"
CLASSES = ("RBC", "WBC", "Platelets", NASTY)
ARCHITECTURE = {
    "name": "seed_convnext_yolo",
    "classes": len(CLASSES),
    "backbone": {"name": "test_convnext"},
    "adapter_channels": [16, 24, 32],
    "neck_channels": [16, 24, 32],
    "neck_repeats": 1,
    "anchors": [[[20, 20], [30, 30]], [[50, 50], [60, 60]], [[90, 90], [120, 120]]],
}
LAPTOP = {"width": 1280, "height": 900}
SERVER = Path(__file__).with_name("serve_watched.py")


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured noise in patches, 320 × 240 px."""
    rng = np.random.default_rng(1)
    patches = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
    path = tmp_path_factory.mktemp("pictures") / "patches.png"
    Image.fromarray(patches).save(path)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, picture_file: Path) -> Path:
    """Random weights, their last layer scaled and shifted to give scores of all sizes."""
    torch.manual_seed(0)
    detector = build_detector(ARCHITECTURE).eval()
    frame, _ = letterbox(np.array(Image.open(picture_file)), 320, 320)
    images = torch.from_numpy(frame).permute(2, 0, 1)[None]
    with torch.no_grad():
        for conv, level in zip(detector.head.convs, detector(images).levels, strict=True):
            scale = 1.3 / level.std((0, 2, 3))  # [A, 5 + C]
            scale[:, 4:] *= 2
            scale = scale.flatten()
            conv.weight.mul_(scale[:, None, None, None])
            conv.bias.sub_(level.mean((0, 2, 3)).flatten()).mul_(scale)
        # fewer objects, until about a hundred candidates are above the page's first threshold
        while (detector.decode(detector(images))[1] > 0.25).sum() > 120:
            for conv in detector.head.convs:
                conv.bias.view(2, -1)[:, 4] -= 0.1
    classes = tuple({"id": 10 * i, "name": name} for i, name in enumerate(CLASSES, 1))
    info = WeightsInfo(ARCHITECTURE, classes, (320, 320), step=1234, metrics={"AP": 0.5})
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(path, detector.state_dict(), info)
    return path


@dataclass
class Server:
    """A running demo."""

    url: str
    process: subprocess.Popen[str]
    passes_file: Path
    outside_file: Path
    log: list[str]

    def passes(self) -> int:
        """How often the network ran so far."""
        return len(self.passes_file.read_text().splitlines()) if self.passes_file.exists() else 0

    def outside(self) -> str:
        """Attempts to reach anything but loopback."""
        return self.outside_file.read_text() if self.outside_file.exists() else ""

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=30)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def start_server(weights: Path) -> Callable[[Path], Server]:
    """Starts `serve` as a process, with its files in a folder, and waits for its URL."""

    def start(folder: Path) -> Server:
        passes, outside = folder / "passes", folder / "outside"
        # A web proxy, as on many clusters, that nobody may use for this machine's own pages.
        environment = {**os.environ, "HTTP_PROXY": "http://192.0.2.1:3128", "TMPDIR": str(folder)}
        process = subprocess.Popen(
            [sys.executable, str(SERVER), str(weights), "0", str(passes), str(outside)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        log: list[str] = []
        threading.Thread(target=lambda: log.extend(process.stdout or ()), daemon=True).start()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if found := re.search(r"ready at (http://127\.0\.0\.1:\d+/)", "".join(log)):
                return Server(found[1], process, passes, outside, log)
            time.sleep(0.1)
        process.kill()
        pytest.fail("the demo did not start:\n" + "".join(log))

    return start


@pytest.fixture(scope="session")
def server(
    start_server: Callable[[Path], Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One running demo for all tests; it must have asked nobody outside when it ends."""
    running = start_server(tmp_path_factory.mktemp("server"))
    yield running
    assert running.stop() == 0, "".join(running.log)
    assert running.outside() == ""


@pytest.fixture(scope="session")
def browser(component: Callable[[str], Path]) -> Iterator[Any]:
    executable = component("chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        browser = playwright.chromium.launch(executable_path=str(executable), args=arguments)
        yield browser
        browser.close()


class Watch:
    """Everything that a page must not do."""

    def __init__(self) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self.outside: list[str] = []

    def follow(self, page: Any) -> None:
        page.on("console", self.on_console)
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", lambda dialog: (self.console.append("dialog"), dialog.dismiss()))
        page.route("**/*", self.on_route)

    def on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.console.append(f"{message.type}: {message.text}")

    def on_route(self, route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("data", "blob") or address.hostname == "127.0.0.1":
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[Callable[..., tuple[Any, Watch]]]:
    """Opens the page for one more user; at the end, none may have misbehaved."""
    opened = []

    def open_one(viewport: dict[str, int] = LAPTOP, **options: Any) -> tuple[Any, Watch]:
        context = browser.new_context(viewport=viewport, **options)
        page, watch = context.new_page(), Watch()
        page.set_default_timeout(20_000)
        watch.follow(page)
        opened.append((context, watch))
        page.goto(server.url)
        for part in (".takes-pictures .invitation", "#choose", ".example", "#iou", "#save-coco"):
            page.locator(part).last.wait_for()  # they come one after another
        return page, watch

    yield open_one
    for context, watch in opened:
        context.close()
        assert watch.console == []
        assert watch.outside == []
