"""`bench infer`: how large detectors are and how fast, several side by side in one run.

A run is images → decoded boxes, before NMS: what depends on the picture's content is left out.
Each detector is timed eager and compiled, in both memory formats; the ways of all detectors take
turns, so that a machine that slows down slows all of them. (Training, `eval` and the demo run
channels last, since pictures come that way.) Weights are random: speed does not
depend on them, and nothing is fetched.
"""

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..model.detector import Detector, build_detector, without_pretrained
from ..model.fuse import fuse
from ..model.memory import keep_freed_memory
from .build import architecture
from .figures import INK, colour_of, open_figure, plain, style
from .load import load_recipe, recipe_path
from .utilization import gflops

CLASSES = 80
TURN = 10  # runs of one way before the next one's turn


@dataclass(frozen=True)
class Speed:
    """One way to run one detector. A row of the table and of the JSON."""

    recipe: str
    parameters: int  # of the training graph
    fused_parameters: int
    gflops: float  # of one picture
    batch: int
    compiled: bool
    channels_last: bool
    latency_ms: float  # median of the runs
    images_per_s: float
    relative: float  # images per second, to the fastest way of the first recipe at this batch


@dataclass
class Way:
    """A detector made ready, and the times it took so far."""

    facts: dict[str, Any]
    run: Callable[[], None]
    seconds: list[float]


def bench_infer(
    recipes: Sequence[str], warmup: int, runs: int, batches: Sequence[int]
) -> list[Speed]:
    """Times recipes side by side.

    Args:
        recipes: files, or names of recipes that come with the package.
        warmup, runs: untimed and timed runs of each way; of a batch its share of them.
        batches: batch sizes, one after the other.

    Raises:
        RecipeError, BackboneError: a mistake, in one sentence.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    # The same for convolutions, which have it by default, and linear layers: TF32 on a GPU.
    torch.set_float32_matmul_precision("high")
    speeds: list[Speed] = []
    detectors = [_detector(name) for name in recipes]
    for batch in batches:
        ways = [
            way
            for facts, detector, frame in detectors
            for way in _ways(facts, detector, frame, batch, device)
        ]
        _time(ways, max(1, warmup // batch), max(3, runs // batch))
        speeds += _rows(ways, recipes[0])
    return speeds


def _detector(name: str) -> tuple[dict[str, Any], Detector, tuple[int, int]]:
    """Sizes of a recipe's detector, the detector folded for inference, and its frame."""
    recipe = load_recipe([recipe_path(name)])
    detector = build_detector(without_pretrained(architecture(recipe, CLASSES))).eval()
    fused = fuse(detector)
    facts = {
        "recipe": name,
        "parameters": sum(p.numel() for p in detector.parameters()),
        "fused_parameters": sum(p.numel() for p in fused.parameters()),
        "gflops": round(gflops(fused, recipe.data.image_px), 2),
    }
    return facts, fused, recipe.data.image_px


def _ways(
    facts: dict[str, Any],
    detector: Detector,
    frame_px: tuple[int, int],
    batch: int,
    device: torch.device,
) -> Iterator[Way]:
    for channels_last in (False, True):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = detector.to(device).to(memory_format=layout)
        images = torch.rand(batch, 3, *frame_px, device=device).to(memory_format=layout)
        for compiled in (False, True):
            # A copy: a compiled function must not see its weights change their layout.
            function = functools.partial(_predict, copy.deepcopy(model))
            if compiled:
                function = _compile(function, device)
            more = {"batch": batch, "compiled": compiled, "channels_last": channels_last}
            yield Way(facts | more, functools.partial(_run, function, images), [])


def _predict(model: Detector, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model.decode(model(images))


def _compile(function: Any, device: torch.device) -> Any:
    """What is fastest on each: weights packed for oneDNN, or CUDA graphs."""
    # All ways share one function, and each is another compilation of it.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    if device.type == "cpu":
        return torch.compile(function, fullgraph=True, dynamic=False, options={"freezing": True})
    return torch.compile(function, fullgraph=True, dynamic=False, mode="reduce-overhead")


def _run(function: Any, images: torch.Tensor) -> None:
    with torch.inference_mode():
        function(images)
        if images.is_cuda:
            torch.cuda.synchronize()


def _time(ways: Sequence[Way], warmup: int, runs: int) -> None:
    bar = tqdm(total=len(ways) * (warmup + runs), desc="bench infer", unit="run", delay=2)
    for way in ways:
        for _ in range(warmup):  # the first run of a compiled one compiles it
            way.run()
            bar.update()
    for start in range(0, runs, TURN):
        for way in ways:
            for _ in range(min(TURN, runs - start)):
                started_s = time.perf_counter()
                way.run()
                way.seconds.append(time.perf_counter() - started_s)
                bar.update()
    bar.close()


def _rows(ways: Sequence[Way], first_recipe: str) -> list[Speed]:
    seconds = [statistics.median(way.seconds) for way in ways]
    base = min(
        s for s, way in zip(seconds, ways, strict=True) if way.facts["recipe"] == first_recipe
    )
    return [
        Speed(
            **way.facts,
            latency_ms=round(s * 1e3, 3),
            images_per_s=round(way.facts["batch"] / s, 3),
            relative=round(base / s, 4),
        )
        for s, way in zip(seconds, ways, strict=True)
    ]


def fastest(speeds: Sequence[Speed]) -> list[Speed]:
    """Of each recipe and batch the fastest way, in their order."""
    best: dict[tuple[str, int], Speed] = {}
    for speed in speeds:
        key = (speed.recipe, speed.batch)
        if key not in best or speed.images_per_s > best[key].images_per_s:
            best[key] = speed
    return list(best.values())


def format_speeds(speeds: Sequence[Speed]) -> str:
    """A table; the fastest way of each recipe is marked."""
    marked = set(map(id, fastest(speeds)))
    lines = [
        f"{'recipe':24} {'params':>11} {'fused':>11} {'GFLOPs':>7} {'batch':>5} "
        f"{'mode':8} {'format':13} {'ms':>9} {'img/s':>8} {'relative':>8}"
    ]
    for s in speeds:
        mode = "compiled" if s.compiled else "eager"
        layout = "channels_last" if s.channels_last else "contiguous"
        lines.append(
            f"{s.recipe[-24:]:24} {s.parameters:>11,} {s.fused_parameters:>11,} {s.gflops:>7.1f} "
            f"{s.batch:>5} {mode:8} {layout:13} {s.latency_ms:>9.1f} {s.images_per_s:>8.2f} "
            f"{s.relative:>8.3f}{' *' if id(s) in marked else ''}"
        )
    first = speeds[0].recipe
    return "\n".join([*lines, f"* fastest way of its recipe; relative to {first}'s fastest"])


def as_records(speeds: Sequence[Speed]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(speed) for speed in speeds]


def draw_speeds(speeds: Sequence[Speed], output: Path) -> Path:
    """Bars of the pictures per second of each recipe's fastest way, a panel for each batch.

    Raises:
        ReportError: the file can't be written.
    """
    best = fastest(speeds)
    batches = sorted({s.batch for s in best})
    with open_figure(output, 5 * len(batches) + 1, 1 + 0.5 * len(best) / len(batches)) as figure:
        for axes, batch in zip(
            figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True
        ):
            rows = [s for s in best if s.batch == batch][::-1]
            style(axes, f"Pictures per second at batch {batch}, fastest way of each")
            axes.set_xlabel("pictures per second", fontsize=9, color=INK)
            names = [plain(Path(s.recipe).stem) for s in rows]
            bars = axes.barh(names, [s.images_per_s for s in rows], color=colour_of(0))
            labels = [f"{s.images_per_s:.2f} ({s.relative:.2f})" for s in rows]
            axes.bar_label(bars, labels, padding=3, fontsize=8, color=INK)
            axes.set_xlim(0, max(s.images_per_s for s in rows) * 1.25)
    return output
