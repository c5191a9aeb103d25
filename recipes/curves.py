"""The curves of runs: losses, average precision and learning rate over epochs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import INK, ReportError, colour_of, open_figure, plain, style
from .tracking import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = {
    "box": "Box loss",
    "obj": "Objectness loss",
    "cls": "Class loss",
    "dfl": "Distribution focal loss",
}
RAW: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.25}
SMOOTH: dict[str, Any] = {"linewidth": 1.8}
VALIDATION: dict[str, Any] = {"linewidth": 1.3, "linestyle": "--", "marker": "o", "markersize": 3.5}
AP: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 3.5}
AP50: dict[str, Any] = AP | {"linestyle": "--", "markerfacecolor": "white"}


@dataclass(frozen=True)
class History:
    """The records of one run."""

    name: str
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]

    @classmethod
    def load(cls, run: Path, name: str) -> "History":
        """Reads metrics.jsonl of a run. Raises ReportError where there is none."""
        if not run.is_dir():
            raise ReportError(f"run {run}: no such folder; give the folder that `train` wrote to")
        records = read_metrics(run)
        if not records:
            raise ReportError(
                f"run {run}: no metrics in its metrics.jsonl yet; wait for its first steps, or "
                "give the folder that `train` wrote to"
            )
        kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "val")}
        return cls(name, kinds["train"], kinds["val"])

    def series(self, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and values, both `[K]`, without the records that lack the number."""
        records = self.train if kind == "train" else self.val
        rows = [(r["epoch"], r[key]) for r in records if r.get(key) is not None]
        epochs, values = np.array(rows, dtype=float).reshape(-1, 2).T
        # pycocotools says -1 where there is nothing to find.
        good = np.isfinite(values) & (values >= 0)
        return epochs[good], values[good]

    def summary(self) -> str:
        """The name and the last AP."""
        last = [
            f"{key} {v[-1]:.3f}" for key in ("AP", "AP50") if len(v := self.series("val", key)[1])
        ]
        return plain(f"{self.name}: {', '.join(last)}" if last else self.name)


def draw_curves(histories: Sequence[History], output: Path) -> Path:
    """Losses of training and validation, AP and AP50, learning rate, over epochs.

    One run: a colour for training and one for validation. Several: a colour for each run.

    Raises:
        ReportError: the file can't be written.
    """
    with open_figure(output, 12, 7.2) as figure:
        keys = [key for key in LOSSES if any(key in r for h in histories for r in h.train)]
        keys = keys or ["box"]  # a run that has only been evaluated
        grid = figure.add_gridspec(2, 1)
        losses = grid[0].subgridspec(1, len(keys)).subplots(squeeze=False)[0]
        lower = grid[1].subgridspec(1, 2, width_ratios=(2, 1))
        precision, rate = figure.add_subplot(lower[0]), figure.add_subplot(lower[1])
        for axes, key in zip(losses, keys, strict=True):
            style(axes, LOSSES[key])
            _draw_loss(axes, histories, key)
        style(precision, "Average precision on the validation pictures (EMA weights)")
        _draw_precision(precision, histories)
        style(rate, "Learning rate")
        for i, history in enumerate(histories):
            rate.plot(*history.series("train", "lr"), color=colour_of(i), linewidth=1.6)
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", scilimits=(-3, 3), useMathText=True)
        last = max((r["epoch"] for h in histories for r in (*h.train, *h.val)), default=0)
        for axes in (*losses, precision, rate):
            axes.set_xlim(0, max(last * 1.01, 1e-3))
        _draw_legend(figure, histories)
    return output


def _draw_loss(axes: "Axes", histories: Sequence[History], key: str) -> None:
    """Training light as logged and firm as smoothed; validation in dots."""
    highest = [0.0]
    for i, history in enumerate(histories):
        epochs, raw = history.series("train", key)
        val_epochs, val = history.series("val", key)
        axes.plot(epochs, raw, color=colour_of(i), **RAW)
        axes.plot(epochs, _smooth(raw), color=colour_of(i), **SMOOTH)
        axes.plot(val_epochs, val, color=_val_colour(i, histories), **VALIDATION)
        # A spike of the first steps must not press everything else flat.
        highest += [float(np.percentile(raw, 99))] if len(raw) else []
        highest += [val.max()] if len(val) else []
    axes.set_ylim(0, max(highest) * 1.08 or 1)


def _draw_precision(axes: "Axes", histories: Sequence[History]) -> None:
    from matplotlib.lines import Line2D

    highest = 0.0
    for i, history in enumerate(histories):
        for key, look in (("AP50", AP50), ("AP", AP)):
            epochs, values = history.series("val", key)
            axes.plot(epochs, values, color=_val_colour(i, histories), **look)
            highest = max(highest, values.max(initial=0))
    axes.set_ylim(0, min(1.0, highest * 1.15) or 1)
    if not any(history.val for history in histories):
        axes.text(0.5, 0.5, "not evaluated yet", transform=axes.transAxes, ha="center", color=INK)
        return
    colour = _val_colour(0, histories) if len(histories) == 1 else INK
    axes.legend(
        [Line2D([], [], color=colour, **look) for look in (AP50, AP)],
        ["AP50", "AP"],
        loc="lower right",
        fontsize=9,
    )


def _val_colour(i: int, histories: Sequence[History]) -> str:
    """A single run has a second colour to spare."""
    return colour_of(1 if len(histories) == 1 else i)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred Gaussian mean, `[K]` → `[K]`; ends use what there is of their window."""
    sigma = len(values) / 50
    if sigma < 0.5:
        return values
    radius = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)

    def blur(x: np.ndarray) -> np.ndarray:
        return np.convolve(np.pad(x, radius), kernel, mode="valid")

    return blur(values) / blur(np.ones_like(values))


def _draw_legend(figure: "Figure", histories: Sequence[History]) -> None:
    from matplotlib.lines import Line2D

    one = len(histories) == 1
    train, val = (colour_of(0), colour_of(1)) if one else (INK, INK)
    looks = [(train, SMOOTH), (train, RAW | {"alpha": 0.5}), (val, VALIDATION)]
    figure.legend(
        [Line2D([], [], color=colour, **look) for colour, look in looks],
        ["train, smoothed", "train, as logged", "validation"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    if one:
        figure.suptitle(histories[0].summary(), fontsize=12, color=INK)
    else:
        figure.legend(
            [Line2D([], [], color=colour_of(i), linewidth=5) for i in range(len(histories))],
            [history.summary() for history in histories],
            loc="outside upper center",
            ncols=min(3, len(histories)),
            frameon=False,
        )
