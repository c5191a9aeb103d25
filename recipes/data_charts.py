"""The statistics of a data set as charts."""

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from .data_statistics import MEDIUM_PX, SMALL_PX, DataStatistics
from .figures import COLOURS, FRAME, INK, colour_of, plain, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 30  # classes, before the rest is put together
_LOG_SPREAD = 100  # between the most and the least frequent class


def draw_classes(axes: "Axes", statistics: DataStatistics) -> None:
    """Boxes by class, the most frequent first; those beyond `MAX_BARS` as one bar."""
    counts = statistics.class_boxes
    order = np.argsort(-counts, kind="stable")
    shown, rest = order[:MAX_BARS], order[MAX_BARS:]
    names = [plain(statistics.classes[i].name) for i in shown]
    values = counts[shown].tolist()
    colours = [colour_of(i) if len(counts) <= len(COLOURS) else COLOURS[0] for i in shown]
    if len(rest):
        names.append(f"{len(rest)} others")
        values.append(int(counts[rest].sum()))
        colours.append(FRAME)
    bars = axes.barh(range(len(values)), values, color=colours, height=0.75)
    axes.bar_label(bars, [f"{value:,}" for value in values], padding=3, fontsize=7, color=INK)
    style(axes, "Boxes of each class")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(y=0.01 if len(values) > 10 else 0.05)
    present = counts[counts > 0]
    is_log = len(present) > 0 and present.max() > _LOG_SPREAD * present.min()
    if is_log:
        axes.set_xscale("log")
        axes.set_xlim(0.7, max(values) * 3)
    else:
        axes.set_xlim(0, max([*values, 1]) * 1.16)
    axes.set_xlabel("boxes, log scale" if is_log else "boxes", fontsize=9, color=INK)


def draw_sizes(axes: "Axes", statistics: DataStatistics) -> None:
    """Boxes by the root of their area in the frame, with COCO's borders."""
    sides = statistics.sides_px
    largest = max(statistics.frame_px)
    edges = np.geomspace(2, largest * 1.01, 40)
    bars, _, _ = axes.hist(sides.clip(edges[0], edges[-1]), edges.tolist(), color=COLOURS[0])
    style(axes, "Size of boxes in the frame")
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("root of area, px", fontsize=9, color=INK)
    axes.set_ylabel("boxes", fontsize=9, color=INK)
    axes.set_ylim(0, max(1.0, float(np.max(bars))) * 1.22)  # room for the shares
    borders = [edges[0], SMALL_PX, MEDIUM_PX, max(edges[-1], MEDIUM_PX)]
    for border in borders[1:3]:
        axes.axvline(border, color=INK, linewidth=0.8, linestyle="--")
    for (name, count), (low, high) in zip(
        statistics.size_counts().items(), itertools.pairwise(borders), strict=True
    ):
        share = count / max(1, statistics.boxes)
        axes.text(
            math.sqrt(low * high),
            0.98,
            f"{name}\n{share:.1%}",
            transform=axes.get_xaxis_transform(),
            horizontalalignment="center",
            verticalalignment="top",
            fontsize=8,
            color=INK,
            clip_on=True,
        )


def draw_crowding(axes: "Axes", statistics: DataStatistics) -> None:
    """Pictures by their number of boxes."""
    crowding = statistics.boxes_per_picture
    most = int(crowding.max(initial=1))
    wide = math.ceil((most + 1) / 60)  # boxes that share a bar
    edges = np.arange(0, most + wide + 1, wide) - 0.5
    axes.hist(crowding, edges.tolist(), color=COLOURS[2], rwidth=0.9)
    style(axes, "Crowding")
    axes.set_xlabel("boxes in a picture", fontsize=9, color=INK)
    axes.set_ylabel("pictures", fontsize=9, color=INK)
    if len(crowding):
        middle = float(np.median(crowding))
        axes.axvline(middle, color=INK, linewidth=0.8, linestyle="--", label=f"median {middle:g}")
        axes.legend(frameon=False, fontsize=8)
