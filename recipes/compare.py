"""Designs against each other: the average precision of their runs over epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .curves import History
from .figures import INK, colour_of, open_figure, plain, style


def compare(runs: Mapping[str, Sequence[Path]], output: Path) -> str:
    """Writes `compare.md` and `compare.png`; returns the table, in Markdown.

    Args:
        runs: for each design its runs, one for each seed.
        output: folder for both.

    Raises:
        ReportError: a run without metrics, or a file that can't be written.
    """
    histories = {
        design: [History.load(run, f"{design}, seed {i}") for i, run in enumerate(folders)]
        for design, folders in runs.items()
    }
    _draw(histories, output / "compare.png")
    table = _table(histories)
    (output / "compare.md").write_text(table + "\n", encoding="utf-8")
    return table


def _table(histories: Mapping[str, Sequence[History]]) -> str:
    """A row for each evaluation: AP and AP50 of each seed, and their mean."""
    curves = {
        f"{design} {metric}": [h.series("val", metric) for h in several]
        for metric in ("AP", "AP50")
        for design, several in histories.items()
    }
    epochs = next(iter(curves.values()))[0][0]
    lines = [
        "| epoch | " + " | ".join(curves) + " |",
        "|---|" + "---|" * len(curves),
    ]
    for row, epoch in enumerate(epochs):
        cells = []
        for several in curves.values():
            values = [v[row] for _, v in several]
            each = " / ".join(f"{value:.3f}" for value in values)
            cells.append(f"**{np.mean(values):.3f}** ({each})")
        lines.append(f"| {epoch:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw(histories: Mapping[str, Sequence[History]], output: Path) -> None:
    """AP over epochs: a colour for each design, its mean firm and its seeds light."""
    with open_figure(output, 7.5, 4.5) as figure:
        axes = figure.subplots()
        style(axes, "Average precision on the validation pictures (EMA weights)")
        axes.set_ylabel("AP", fontsize=9, color=INK)
        for i, (design, several) in enumerate(histories.items()):
            series = [h.series("val", "AP") for h in several]
            for epochs, values in series:
                axes.plot(epochs, values, color=colour_of(i), linewidth=0.8, alpha=0.4)
            mean = np.mean([values for _, values in series], axis=0)
            label = plain(f"{design}: {mean[-1]:.3f}, mean of {len(series)} seeds")
            axes.plot(
                series[0][0], mean, color=colour_of(i), marker="o", markersize=3.5, label=label
            )
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right", fontsize=9)
