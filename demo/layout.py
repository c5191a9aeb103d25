"""The page, built from Gradio's parts: what stands where, and which event calls which handler."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from convnext_yolo.model.predictor import Predictor

from . import page
from .handlers import CONFIDENCE, FLOOR, IOU, Handlers, forget
from .images import load_picture

_Move = Callable[[str | Path | None], Awaitable[str | None]]

_DAY_S = 86_400
# The network's turn: one picture at a time, whoever asks, the page or the API.
_IN_TURN: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1}
_UNSEEN: dict[str, Any] = {"api_visibility": "private"}  # not part of the API


def build_app(predictor: Predictor, folder: Path, examples: Sequence[Path] = ()) -> gr.Blocks:
    """Builds the page and the endpoint `/detect`; `app.launch` starts it.

    Args:
        predictor: of the model that is shown.
        folder: Gradio's own (`GRADIO_TEMP_DIR`): uploads, shown pictures, downloads.
        examples: pictures to pick from.

    Raises:
        PictureError: an example is not a picture.
    """
    icons = [_thumbnail(path, folder / f"example-{i}.jpg") for i, path in enumerate(examples)]
    with gr.Blocks(
        title="ConvNeXt-YOLO",
        analytics_enabled=False,
        fill_width=True,  # page.css sets the width
        delete_cache=(3600, _DAY_S),
    ) as app:
        state = gr.State(None, time_to_live=_DAY_S, delete_callback=forget)
        _html(page.masthead(predictor.info), "masthead")
        with gr.Row(elem_id="bar"):
            choose = gr.UploadButton("Choose a picture", variant="primary", elem_id="choose")
            picks = [
                gr.Button(_title(path), icon=icon, elem_classes="example")
                for path, icon in zip(examples, icons, strict=True)
            ]
            for pick, icon in zip(picks, icons, strict=True):
                pick.keep_in_cache.add(icon)  # when uploads of a day ago are swept away
        with gr.Row():
            with gr.Column(scale=7, min_width=320):
                stage = _html(page.empty_stage(), "stage")
            with gr.Column(scale=3, min_width=280):
                sliders = _sliders()
                counts = _html("", "counts")
                with gr.Row(elem_id="saves"):
                    save_picture = gr.Button("Save picture", interactive=False, elem_id="save")
                    save_coco = gr.Button("Save COCO JSON", interactive=False, elem_id="save-coco")
        handlers = Handlers(predictor, folder)
        seen: list[Any] = [state, *sliders]
        shown: dict[str, Any] = {
            "fn": handlers.show,
            "inputs": seen,
            "outputs": [stage, counts, save_picture, save_coco],
            "show_progress": "hidden",
            "concurrency_limit": 4,
            **_UNSEEN,
        }
        _on_pictures(handlers, choose, zip(picks, examples, strict=True), state, stage, shown)
        # Starts when the pass before is done, with the values of then: dragging never piles up.
        gr.on([slider.change for slider in sliders], trigger_mode="always_last", **shown)
        _on_save(save_picture, handlers.annotated, seen)
        _on_save(save_coco, handlers.coco, seen)
        gr.api(handlers.detect, api_name="detect", **_IN_TURN)
    _fetch_nothing(app)
    return app.queue(max_size=32)


def _fetch_nothing(app: gr.Blocks) -> None:
    """Where a caller gives a URL for a file, Gradio would fetch it. Here nobody goes outside."""

    def local_only(move: _Move) -> _Move:
        async def checked(path: str | Path | None) -> str | None:
            if "://" in str(path):
                raise gr.Error(
                    "image: this server fetches no URLs; download the file and upload it.",
                    print_exception=False,
                )
            return await move(path)

        return checked

    for block in app.blocks.values():
        move = block.async_move_resource_to_block_cache
        setattr(block, "async_move_resource_to_block_cache", local_only(move))  # noqa: B010


def _html(value: str, name: str) -> gr.HTML:
    return gr.HTML(value, elem_id=name, apply_default_css=False, js_on_load=None)


def _sliders() -> list[gr.Slider]:
    return [
        gr.Slider(
            FLOOR,
            0.99,
            CONFIDENCE,
            step=0.01,
            label="Confidence",
            info="Lowest score shown",
            elem_id="confidence",
            buttons=[],
        ),
        gr.Slider(
            0.05,
            0.95,
            IOU,
            step=0.05,
            label="IoU",
            info="Largest overlap kept",
            elem_id="iou",
            buttons=[],
        ),
    ]


def _title(path: Path) -> str:
    """smear-1.jpg → Smear 1."""
    words = path.stem.replace("-", " ").replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _thumbnail(path: Path, small: Path) -> str:
    """A small copy of an example, for its button."""
    image = Image.fromarray(load_picture(path))
    image.thumbnail((160, 120))
    image.save(small, quality=85)
    return str(small)


def _on_pictures(
    handlers: Handlers,
    choose: gr.UploadButton,
    examples: Iterable[tuple[gr.Button, Path]],
    state: gr.State,
    stage: gr.HTML,
    shown: dict[str, Any],
) -> None:
    """A picture goes through the network, then it is shown by the sliders as they stand then."""
    look: dict[str, Any] = {
        "outputs": state,
        "show_progress": "minimal",
        "show_progress_on": stage,
        "trigger_mode": "always_last",
        **_IN_TURN,
        **_UNSEEN,
    }
    choose.upload(handlers.look, [choose, state], **look).then(**shown)
    for button, path in examples:

        def pick(before: Any, path: Path = path) -> Any:
            return handlers.look(str(path), before)

        button.click(pick, state, **look).then(**shown)


def _on_save(button: gr.Button, make: Callable[..., str | None], seen: list[Any]) -> None:
    """Files are made when somebody asks for them.

    Gradio's own download button starts before its handler has run, so a hidden one is pressed
    after it.
    """
    hidden = gr.DownloadButton(visible="hidden", elem_id=f"{button.elem_id}-file")
    press = f"() => document.querySelector('#{hidden.elem_id}').click()"
    button.click(make, seen, hidden, show_progress="hidden", **_UNSEEN).success(js=press, **_UNSEEN)
