"""The report of runs: their curves, and their predictions beside the ground truth, as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data_prep.reader import Sample, SampleReader, ShardReader
from ..model.postprocess import Detections
from ..model.predictor import Predictor
from .build import cache_options
from .curves import History, draw_curves
from .figures import COLOURS, INK, colour_of, open_figure, plain, write_label
from .figures import ReportError as ReportError
from .load import load_recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WEIGHTS = "model.safetensors"  # of a run, as `export` writes it
CONFIDENCE, IOU = 0.25, 0.45  # of the predictions that are drawn


def report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Draws the curves of runs in one figure, and the predictions of each run that is exported.

    Args:
        runs: run folders.
        output: the folder of the figures; made if it is not there.

    Returns:
        The files: curves.png, and predictions.png (several runs: predictions-NAME.png).

    Raises:
        ReportError: no such run, a run without metrics, an output that can't be written.
        DataError, WeightsError, RecipeError: validation shards or weights that can't be read.
    """
    histories = [History.load(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    figures = [draw_curves(histories, output / "curves.png")]
    for run, history in zip(runs, histories, strict=True):
        weights = run / WEIGHTS
        if not weights.is_file():
            print(
                f"run {run}: no {WEIGHTS} yet, so its predictions are not drawn; "
                f"`convnext-yolo export {run} --output {weights}` makes it"
            )
            continue
        suffix = "" if len(runs) == 1 else "-" + history.name.strip("/").replace("/", "-")
        data = load_recipe([run / "recipe.yaml"]).data
        reader = ShardReader(data.val, cache_options(data))
        figures.append(draw_predictions(weights, reader, output / f"predictions{suffix}.png"))
    return figures


def _names(runs: Sequence[Path]) -> list[str]:
    """The folder names, or whole paths where two runs share a name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def draw_predictions(weights: Path, reader: SampleReader, output: Path, pictures: int = 6) -> Path:
    """Draws pictures of a data set twice: with their ground truth, and with the predictions.

    The pictures are spread evenly over the data set, so the choice is the same every time.

    Args:
        weights: exported weights.
        reader: the data set.
        output: the PNG file.
        pictures: how many, at most.

    Raises:
        WeightsError, DataError: weights or pictures that can't be read.
    """
    predictor = Predictor.load(weights)
    info = predictor.info
    truth_names = [category.name for category in reader.classes]
    names = [str(c["name"]) for c in info.classes]
    colours = {name: colour_of(i) for i, name in enumerate(dict.fromkeys(names + truth_names))}
    count = min(pictures, len(reader))
    samples = [reader.decode(int((i + 0.5) * len(reader) / count)) for i in range(count)]
    pairs = min(2, count)  # pairs of pictures in a row of the grid
    # A gap between the pairs: what belongs together stands together.
    widths = [1, 1, 0.06, 1, 1][: 3 * pairs - 1]
    tall = [min(s.image.shape[0] / s.image.shape[1], 1.2) for s in samples]
    heights = [max(tall[i : i + pairs]) for i in range(0, count, pairs)]
    seen: set[str] = set()
    with open_figure(output, 6 * pairs, 0.8 + 3 * sum(heights)) as figure:
        grid = figure.add_gridspec(
            len(heights), len(widths), width_ratios=widths, height_ratios=heights
        )
        for i, sample in enumerate(samples):
            (found,) = predictor([sample.image], CONFIDENCE, IOU)
            row, column = i // pairs, i % pairs * 3
            halves = (_truth(sample, truth_names), _predictions(found, names))
            for side, marks in enumerate(halves):
                axes = figure.add_subplot(grid[row, column + side])
                if row == 0:
                    axes.set_title(("Ground truth", "Predictions")[side], fontsize=10, color=INK)
                axes.imshow(sample.image)
                axes.set_axis_off()
                axes.set_anchor("N")
                for mark in marks:
                    _draw_mark(axes, mark, colours[mark.name])
                    seen.add(mark.name)
        score = f", AP {info.metrics['AP']:.3f}" if "AP" in info.metrics else ""
        where = plain(f"{weights.absolute().parent.name}/{weights.name}")
        title = f"{where}: step {info.step}{score}; predictions that score over {CONFIDENCE}"
        figure.suptitle(title, fontsize=10, color=INK)
        _draw_legend(figure, {name: c for name, c in colours.items() if name in seen})
    return output


class Mark(NamedTuple):
    """A box with its label, as it is drawn."""

    box_xyxy: Sequence[float]
    name: str
    text: str
    line: str = "-"


def _truth(sample: Sample, names: Sequence[str]) -> list[Mark]:
    """Crowds, which stand for many objects, are dashed."""
    rows = zip(sample.boxes_xyxy.tolist(), sample.labels, sample.crowd, strict=True)
    return [Mark(box, names[k], names[k], "--" if crowd else "-") for box, k, crowd in rows]


def _predictions(found: Detections, names: Sequence[str]) -> list[Mark]:
    """The best last, so that nothing covers them."""
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [Mark(box, names[k], f"{names[k]} {score:.2f}") for box, score, k in rows][::-1]


def _draw_mark(axes: "Axes", mark: Mark, colour: str) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = mark.box_xyxy
    look: dict[str, Any] = {"color": colour, "linestyle": mark.line, "linewidth": 1.2}
    axes.add_artist(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **look))
    write_label(axes, (x1, y1), mark.text, colour, pad_pt=0.8)


def _draw_legend(figure: "Figure", colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    # With more classes than colours a legend would say nothing: the labels do.
    if 0 < len(colours) <= len(COLOURS):
        figure.legend(
            [Patch(color=colour) for colour in colours.values()],
            [plain(name) for name in colours],
            loc="outside lower center",
            ncols=len(colours),
            frameon=False,
            fontsize=9,
        )
