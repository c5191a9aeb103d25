"""Designs against each other: the average precision of their runs over epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .curves import History
from .figures import INK, ReportError, colour_of, open_figure, plain, style


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
    try:
        (output / "compare.md").write_text(table + "\n", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{output}/compare.md: can't be written ({error.strerror})") from error
    return table


def _table(histories: Mapping[str, Sequence[History]]) -> str:
    """A row for each evaluation that all runs have: mean of AP and AP50, and each seed's."""
    curves = {
        f"{design} {metric}": [_by_epoch(h, metric) for h in several]
        for metric in ("AP", "AP50")
        for design, several in histories.items()
    }
    lines = ["| epoch | " + " | ".join(curves) + " |", "|---|" + "---|" * len(curves)]
    for epoch in _common_epochs(histories):
        cells = []
        for several in curves.values():
            values = [by_epoch[epoch] for by_epoch in several]
            each = " / ".join(f"{value:.3f}" for value in values)
            cells.append(f"**{np.mean(values):.3f}** ({each})")
        lines.append(f"| {epoch:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_epoch(history: History, metric: str) -> dict[float, float]:
    epochs, values = history.series("val", metric)
    return dict(zip(epochs.tolist(), values.tolist(), strict=True))


def _common_epochs(histories: Mapping[str, Sequence[History]]) -> list[float]:
    runs = [h for several in histories.values() for h in several]
    common = set.intersection(*(set(_by_epoch(h, m)) for h in runs for m in ("AP", "AP50")))
    if not common:
        raise ReportError(
            "the runs have no evaluated epoch in common; train them with one `evaluation` section"
        )
    return sorted(common)


def _draw(histories: Mapping[str, Sequence[History]], output: Path) -> None:
    """AP over epochs: a colour for each design, its mean firm and its seeds light."""
    with open_figure(output, 7.5, 4.5) as figure:
        axes = figure.subplots()
        style(axes, "Average precision on the validation pictures (EMA weights)")
        axes.set_ylabel("AP", fontsize=9, color=INK)
        epochs = _common_epochs(histories)
        for i, (design, several) in enumerate(histories.items()):
            curves = [[_by_epoch(h, "AP")[epoch] for epoch in epochs] for h in several]
            for values in curves:
                axes.plot(epochs, values, color=colour_of(i), linewidth=0.8, alpha=0.4)
            mean = np.mean(curves, axis=0)
            label = plain(f"{design}: {mean[-1]:.3f}, mean of {len(curves)} seeds")
            axes.plot(epochs, mean, "o-", color=colour_of(i), markersize=3.5, label=label)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right", fontsize=9)
