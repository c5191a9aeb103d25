"""What happens on the page's events and the API's calls."""

import json
import logging
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.data_classes import FileData
from PIL import Image

from convnext_yolo.model.postprocess import Candidates
from convnext_yolo.model.predictor import Predictor

from . import page
from .images import PictureError, load_picture
from .overlay import draw_boxes, svg_overlay
from .results import class_counts, class_names, coco_document, detect_answer

FLOOR = 0.01  # score of the weakest candidates that are kept for the sliders
CONFIDENCE, IOU = 0.25, 0.45  # where the sliders stand at first
SHOWN_PX = 1600  # longest side of the picture that the browser gets; downloads have full size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """One user's picture after its pass through the network."""

    path: Path  # as it was uploaded
    shown: Path  # as the browser gets it
    width_px: int
    height_px: int
    found: Candidates  # above FLOOR


@dataclass(frozen=True)
class Refusal:
    """One user's picture that can't be used, and why."""

    sentence: str


State = Look | Refusal | None  # what Gradio keeps for each session; None before the first picture


def forget(state: State) -> None:
    """Deletes what the browser got of a picture that is not shown any more."""
    if isinstance(state, Look):
        state.shown.unlink(missing_ok=True)


class Handlers:
    """The functions behind the page and the API, for one model.

    Args:
        predictor: of the model that is shown.
        folder: for files that the browser may fetch; uploads lie in it too.
    """

    def __init__(self, predictor: Predictor, folder: Path):
        self.predictor, self.info, self.folder = predictor, predictor.info, folder
        self.names = class_names(predictor.info)

    def _find(self, path: Path, floor: float) -> tuple[np.ndarray, Candidates]:
        """File → RGB `[H, W, 3]`, its candidates. `PictureError` for whatever goes wrong."""
        picture = load_picture(path)
        try:
            return picture, self.predictor.candidates([picture], floor)[0]
        except Exception as error:
            log.exception("the model failed on %s", path.name)
            reason = (str(error).strip() or "no message").splitlines()[0][:200]
            raise PictureError(
                f"{path.name}: the model failed on this picture "
                f"({type(error).__name__}: {reason}); the server's log says more."
            ) from error

    def look(self, upload: str | None, before: State) -> State:
        """Upload → one pass through the network, whose result the sliders then filter."""
        if upload is None:
            return before
        forget(before)
        path = Path(upload)
        try:
            picture, found = self._find(path, FLOOR)
        except PictureError as refusal:
            return Refusal(str(refusal))
        height_px, width_px = picture.shape[:2]
        # A name that no other user can guess.
        shown = self.folder / f"shown-{secrets.token_hex(16)}.jpg"
        image = Image.fromarray(picture)
        image.thumbnail((SHOWN_PX, SHOWN_PX))
        image.save(shown, quality=90)
        return Look(path, shown, width_px, height_px, found)

    def show(self, state: State, confidence: float, iou: float) -> tuple[Any, ...]:
        """Candidates and thresholds → picture with boxes, counts, the two download buttons."""
        if not isinstance(state, Look):
            stage = page.refused_stage(state.sentence) if state else page.empty_stage()
            return stage, "", *[gr.update(interactive=False)] * 2
        found = state.found.suppress(confidence, iou)
        counts = class_counts(found, len(self.names))
        scores = state.found.found.scores
        best = scores.max().item() if len(scores) else 0.0
        stage = page.picture_stage(
            f"gradio_api/file={state.shown}",
            state.width_px,
            state.height_px,
            svg_overlay(found, state.width_px, state.height_px, self.names),
            page.picture_words(state.path.name, counts, self.names),
        )
        table = page.counts_table(counts, self.names, confidence, best)
        return stage, table, *[gr.update(interactive=True)] * 2

    def annotated(self, state: State, confidence: float, iou: float) -> str | None:
        """File of the picture with its boxes, in full size: JPEG for a JPEG, else PNG."""
        if not isinstance(state, Look):
            return None
        try:
            picture = load_picture(state.path)
        except PictureError as error:  # uploads are swept away after a day
            raise gr.Error(f"{error} Upload it again.", print_exception=False) from error
        image = draw_boxes(picture, state.found.suppress(confidence, iou), self.names)
        stem, suffix = state.path.stem, state.path.suffix.lower()
        if suffix in (".jpg", ".jpeg"):
            path = self._download(f"{stem}-boxes.jpg")
            image.save(path, quality=95, subsampling=0)
        else:
            path = self._download(f"{stem}-boxes.png")
            image.save(path)
        return str(path)

    def coco(self, state: State, confidence: float, iou: float) -> str | None:
        """File of the boxes as COCO JSON."""
        if not isinstance(state, Look):
            return None
        found = state.found.suppress(confidence, iou)
        size_px = state.width_px, state.height_px
        document = coco_document(found, state.path.name, size_px, self.info, confidence, iou)
        path = self._download(f"{state.path.stem}-coco.json")
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        return str(path)

    def _download(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder)) / name

    def detect(
        self, image: FileData, confidence: float = CONFIDENCE, iou: float = IOU
    ) -> dict[str, Any]:
        """Finds objects in a picture.

        `image` is an uploaded file, in Python `gradio_client.handle_file(path)`; `confidence` the
        least score of a box; `iou` the overlap above which the weaker of two boxes of a class goes.
        Boxes are [x, y, width, height] in pixels of the upright picture, best first.
        """
        try:
            path = self._uploaded(image)
            for name, value in (("confidence", confidence), ("iou", iou)):
                if not isinstance(value, int | float) or not 0 <= value <= 1:
                    raise PictureError(f"{name}: {value!r} is not a number from 0 to 1.")
            picture, found = self._find(path, min(FLOOR, confidence))
        except PictureError as error:
            raise gr.Error(str(error), print_exception=False) from error
        height_px, width_px = picture.shape[:2]
        return detect_answer(found.suppress(confidence, iou), width_px, height_px, self.info)

    def _uploaded(self, image: Any) -> Path:
        """The path in an argument of the API, which anybody may have written."""
        path = image.get("path") if isinstance(image, dict) else None
        if not isinstance(path, str) or not path:
            raise PictureError(
                "image: not an uploaded file; gradio_client's handle_file gives one."
            )
        if not Path(path).resolve().is_relative_to(self.folder.resolve()):
            raise PictureError("image: only files that were uploaded to this server can be read.")
        return Path(path)
