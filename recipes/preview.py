"""A look at the data before a run: samples as training will see them, and what they are made of.

H W frame; N boxes; C classes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data_prep.loader import training_batches
from ..data_prep.reader import ShardReader
from ..data_prep.stream import BatchPlan
from .build import cache_options
from .config import Recipe
from .data import training_stream
from .data_charts import MAX_BARS, draw_classes, draw_crowding, draw_sizes
from .data_statistics import DataStatistics, data_statistics
from .figures import (
    COLOURS,
    INK,
    ReportError,
    check_writable,
    colour_of,
    open_figure,
    plain,
    write_label,
)
from .optim import total_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

MAX_SAMPLES = 64
_WIDTH_IN = 12.0


@dataclass(frozen=True)
class AugmentedSample:
    """One picture as the network gets it."""

    image: np.ndarray  # [H, W, 3] uint8, RGB
    boxes_xyxy: np.ndarray  # [N, 4] float32, pixels of the frame
    labels: np.ndarray  # [N] int64
    image_id: int  # of the primary picture


def preview(
    recipe: Recipe,
    output: Path,
    samples: int = 12,
    step: int = 0,
    json_file: Path | None = None,
    progress: bool = True,
) -> DataStatistics:
    """Draws the first samples of a global batch, and the statistics of all training annotations.

    Args:
        recipe: whose training data, seed and augmentation are shown.
        output: the PNG file.
        samples: how many; beyond the global batch those of the next ones follow.
        step: the global batch, counted from 0.
        json_file: where the statistics are written as well.
        progress: show a bar while annotations are read.

    Raises:
        ReportError: an output that can't be written, or numbers out of range.
        DataError: no such shards, or fewer samples than a global batch.
    """
    if output.suffix.lower() != ".png":
        raise ReportError(f"figure {output}: only .png can be written; give --output NAME.png")
    if not 1 <= samples <= MAX_SAMPLES:
        raise ReportError(f"--samples {samples}: give a number from 1 to {MAX_SAMPLES}")
    reader = ShardReader(recipe.data.train, cache_options(recipe.data))
    shown = augmented_samples(recipe, reader, samples, step)
    for file in filter(None, (output, json_file)):
        check_writable(file)
    statistics = data_statistics(reader, recipe.data.image_px, progress)
    _draw(recipe, shown, step, statistics, output)
    if json_file:
        text = json.dumps(statistics.document(), indent=1, ensure_ascii=False)
        json_file.write_text(text + "\n", encoding="utf-8")
    return statistics


def augmented_samples(
    recipe: Recipe, reader: ShardReader, count: int, step: int
) -> list[AugmentedSample]:
    """The first samples that training takes from a global step on, whatever its world size.

    Raises:
        ReportError: training ends before that step.
        DataError: fewer samples than a global batch, or too many corrupt ones in a row.
    """
    plan = BatchPlan(recipe.batch.global_size, recipe.batch.micro, rank=0, world_size=1)
    stream = training_stream(recipe, reader, plan, step)
    steps = total_steps(stream.order.steps, recipe.schedule)
    if not 0 <= step < steps:
        raise ReportError(f"--step {step}: training has {steps} steps; give 0 to {steps - 1}")
    shown: list[AugmentedSample] = []
    for batch in training_batches(stream, workers=0):
        for i, image in enumerate(batch.images.numpy()):
            mine = batch.image_index == i
            boxes, labels = batch.boxes_xyxy[mine].numpy(), batch.labels[mine].numpy()
            shown.append(AugmentedSample(image.copy(), boxes, labels, batch.image_ids[i]))
        if len(shown) >= count:
            break
    return shown[:count]


# --- drawing -------------------------------------------------------------------------------------


def _draw(
    recipe: Recipe,
    shown: Sequence[AugmentedSample],
    step: int,
    statistics: DataStatistics,
    output: Path,
) -> None:
    height_px, width_px = recipe.data.image_px
    columns = _columns(len(shown), height_px / width_px)
    rows = math.ceil(len(shown) / columns)
    grid_in = rows * (_WIDTH_IN / max(columns, 3) * height_px / width_px + 0.15) + 0.8
    bars = min(len(statistics.classes), MAX_BARS + 1)
    is_long = bars > 10
    charts_in = max(5.9, 0.19 * bars + 1.3) if is_long else 3.4
    with open_figure(output, _WIDTH_IN, grid_in + charts_in) as figure:
        parts = figure.subfigures(2, squeeze=False, height_ratios=(grid_in, charts_in))
        above, below = parts[:, 0]
        _draw_samples(above, shown, columns, [c.name for c in statistics.classes])
        above.suptitle(
            plain(
                f"{recipe.data.train}: samples as training sees them, global batch {step}, "
                f"seed {recipe.seed}, {width_px}x{height_px} px"
            ),
            fontsize=10,
            color=INK,
        )
        layout = (
            [["classes", "sizes"], ["classes", "crowding"]]
            if is_long
            else [["classes", "sizes", "crowding"]]
        )
        below.suptitle(
            f"all {statistics.pictures:,} pictures: {statistics.boxes:,} boxes of "
            f"{len(statistics.classes)} classes",
            fontsize=10,
            color=INK,
        )
        charts = below.subplot_mosaic(layout)
        draw_classes(charts["classes"], statistics)
        draw_sizes(charts["sizes"], statistics)
        draw_crowding(charts["crowding"], statistics)


def _columns(count: int, tall: float) -> int:
    """Columns of a grid a third wider than high, with few empty places at its end.

    Args:
        count: of pictures.
        tall: their height by their width.
    """
    wanted = math.ceil(math.sqrt(count * tall * 4 / 3))
    near = range(max(1, wanted - 1), min(count, wanted + 1) + 1)
    return min(near, key=lambda columns: (-count % columns, abs(columns - wanted)))


def _draw_samples(
    figure: "SubFigure", shown: Sequence[AugmentedSample], columns: int, names: Sequence[str]
) -> None:
    from matplotlib.patches import Patch

    has_legend = len(names) <= len(COLOURS)
    grid = figure.add_gridspec(math.ceil(len(shown) / columns), columns)
    for i, sample in enumerate(shown):
        axes = figure.add_subplot(grid[divmod(i, columns)])
        axes.imshow(sample.image)
        axes.set_axis_off()
        axes.set_title(f"image {sample.image_id}", fontsize=6, color=INK, pad=2)
        _draw_boxes(axes, sample, names, with_names=not has_legend)
    if has_legend:
        figure.legend(
            [Patch(color=colour_of(i)) for i in range(len(names))],
            [plain(name) for name in names],
            loc="outside lower center",
            ncols=len(names),
            frameon=False,
            fontsize=9,
        )


def _draw_boxes(
    axes: "Axes", sample: AugmentedSample, names: Sequence[str], with_names: bool
) -> None:
    """Boxes in the colours of their classes; names where a legend could not tell those apart."""
    from matplotlib.patches import Rectangle

    for (x1, y1, x2, y2), label in zip(
        sample.boxes_xyxy.tolist(), sample.labels.tolist(), strict=True
    ):
        colour = colour_of(label)
        for line_colour, width in (("white", 2.0), (colour, 1.2)):
            axes.add_artist(
                Rectangle(
                    (x1, y1), x2 - x1, y2 - y1, fill=False, color=line_colour, linewidth=width
                )
            )
        if with_names:
            write_label(axes, (x1, y1), names[label], colour, pad_pt=0.6)
