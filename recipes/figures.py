"""How all figures look, and how they reach the disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's colours, which colour-blind readers tell apart; of runs and of classes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46", "#555555")
INK, GRID, FRAME = "#222222", "#E4E4E4", "#BBBBBB"


class ReportError(Exception):
    """A run that can't be reported. The text is one sentence."""

    exit_code = 2


@contextmanager
def open_figure(output: Path, width_in: float, height_in: float) -> Iterator["Figure"]:
    """A figure that is written at the end, in one atomic step; no global state of pyplot."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)  # inches
    figure = Figure(figsize=(width_in, height_in), layout=layout)
    yield figure
    try:
        with whole_file(output) as partial:
            figure.savefig(partial, format="png", dpi=DPI)
    except OSError as error:
        raise ReportError(
            f"figure {output}: can't be written ({error.strerror}); give another --output"
        ) from error


def check_writable(path: Path) -> None:
    """Makes the folder of a file that is to be written later.

    Raises:
        ReportError: the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ReportError(f"{path}: can't be written ({error.strerror}); give another") from error


def style(axes: "Axes", title: str) -> None:
    """A quiet frame for curves over epochs."""
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel("epoch", fontsize=9, color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FRAME)


def write_label(
    axes: "Axes", corner_px: tuple[float, float], text: str, colour: str, pad_pt: float
) -> None:
    """White text on a colour, below and right of a corner of a box in a picture."""
    axes.text(
        *corner_px,
        plain(text),
        fontsize=5,
        color="white",
        verticalalignment="top",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": pad_pt, "alpha": 0.85},
        clip_on=True,
        in_layout=False,  # or the layout measures every label, twice
    )


def colour_of(i: int) -> str:
    """The colour of the i-th run or class; they come round again."""
    return COLOURS[i % len(COLOURS)]


def plain(text: str) -> str:
    """Text that matplotlib takes as it is: neither mathematics nor a hidden entry."""
    return text.replace("$", r"\$").removeprefix("_") or text
