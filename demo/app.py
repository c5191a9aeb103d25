"""The demo's server: loads the weights, shows the page on this machine, ends when it is told to.

Importing this module does not import gradio, which takes seconds and belongs to an extra.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from convnext_yolo.model.memory import keep_freed_memory
from convnext_yolo.model.predictor import Predictor

from .results import class_names
from .server import HOST, DemoError, LoopbackOnly, usable_port

if TYPE_CHECKING:
    import gradio as gr

ASSETS = Path(__file__).parent / "assets"
MAX_FILE_SIZE = "64mb"
_BLOOD_CELLS = {"rbc", "wbc", "platelets"}  # classes of the bundled pictures


def serve(
    weights: Path,
    port: int | None = None,
    examples: Sequence[Path] | None = None,
    open_browser: bool = False,
) -> None:
    """Shows a model's page at 127.0.0.1 until SIGINT (Ctrl-C) or SIGTERM.

    Call it in the main thread of a process of its own: it sets Gradio's environment variables and
    signal handlers.

    Args:
        weights: a file written by `export`.
        port: to listen on; None and 0 stand for any free one.
        examples: pictures to pick from; None for the bundled ones, if they suit the model.
        open_browser: open the page in the user's browser.

    Raises:
        WeightsError: the weights can't be used.
        DemoError: the port can't be used, gradio is not installed.
        PictureError: an example is not a picture.
    """
    port = usable_port(port)
    if find_spec("gradio") is None:
        raise DemoError("the demo needs gradio: pip install 'convnext-yolo[demo]'")
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        predictor = Predictor.load(weights)
        keep_freed_memory(predictor.device)
        if examples is None:
            examples = bundled_examples(class_names(predictor.info))
        with tempfile.TemporaryDirectory(prefix="convnext-yolo-demo-") as folder:
            isolate(Path(folder))
            from .layout import build_app

            app = build_app(predictor, Path(folder), examples)
            try:
                url = launch(app, port, open_browser)
                print(f"Demo of {weights} ready at {url} (Ctrl-C ends it)", flush=True)
                threading.Event().wait()  # for a signal
            finally:
                app.close(verbose=False)
    except _Ended:
        print("Demo ended", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Ended(BaseException):
    """The user or the system told the demo to end."""


def _end(*_: object) -> None:
    raise _Ended


def isolate(folder: Path) -> None:
    """Tells Gradio, before it is imported, to ask nobody outside and to keep files in `folder`."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "GRADIO_TEMP_DIR": str(folder),
    }
    # A cluster's web proxy is not to be asked for pages of this very machine.
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [os.environ.get(name, ""), HOST, "localhost"]
        os.environ[name] = ",".join(host for host in hosts if host)


def launch(app: "gr.Blocks", port: int, open_browser: bool = False) -> str:
    """Starts the server in threads of its own; returns the URL of the page.

    Raises:
        DemoError: somebody took the port in between.
    """
    from starlette.middleware import Middleware

    try:
        _, url, _ = app.launch(
            server_name=HOST,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,  # a cause in one line, instead of "Error"; never a traceback
            inline=False,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            run_history=False,  # Gradio would keep pictures in the browser
            footer_links=[],
            root_path="",
            max_file_size=MAX_FILE_SIZE,
            state_session_capacity=64,
            app_kwargs={"middleware": [Middleware(LoopbackOnly)]},
            theme=_theme(),
            css=(ASSETS / "page.css").read_text(encoding="utf-8"),
            head=f"<script>{(ASSETS / 'page.js').read_text(encoding='utf-8')}</script>",
        )
    except OSError as error:
        raise DemoError(f"the demo can't listen at {HOST}:{port} ({error})") from error
    return str(url)


def _theme() -> "gr.themes.Base":
    """Light, with the system's fonts; all text has WCAG's contrast of 4.5 on its ground."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="md",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_border_color="*neutral_300",
        slider_color="*primary_600",
    )


def bundled_examples(classes: Sequence[str]) -> list[Path]:
    """The example pictures that suit a model of these classes."""
    if not {name.lower() for name in classes} >= _BLOOD_CELLS:
        return []
    return sorted((ASSETS / "blood_cells").glob("*.jpg"))
