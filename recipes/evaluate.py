"""COCO evaluation: predictions of all processes, pycocotools' twelve numbers, per class too."""

import functools
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data_prep.batch import Batch, Corrupt, Truth
from ..data_prep.cache import CacheOptions
from ..data_prep.errors import DataError
from ..data_prep.formats import read_coco
from ..data_prep.reader import FileReader, SampleReader, ShardReader
from ..data_prep.remote import is_url
from ..data_prep.validation import (
    RectangularSet,
    ValidationSet,
    rectangular_batches,
    validation_batches,
)
from ..model.assign import Targets
from ..model.detector import Criterion, Detector
from ..model.letterbox import letterbox
from ..model.memory import keep_freed_memory
from ..model.postprocess import Detections, candidates
from ..model.weights import load_detector
from .coco import coco_metrics, format_results, match_classes
from .config import EvalSection
from .export import exported_weights
from .files import write_whole
from .heartbeat import heartbeat

LOOK_EVERY_S = 0.2  # for a request to stop


@dataclass(frozen=True)
class EvalSettings:
    """How to run the detector over a data set."""

    frame_px: tuple[int, int]  # height, width
    batch: int
    workers: int
    confidence: float
    iou: float
    # "square": all in that frame; "rect": each batch in one hardly larger than its pictures
    letterbox: Literal["square", "rect"] = "square"


@dataclass(frozen=True)
class Evaluation:
    """The outcome, on the main rank. Losses are there if a criterion was given."""

    results: dict[str, Any]  # METRICS, and "per_class"
    losses: dict[str, float]
    corrupt: tuple[Corrupt, ...] = ()  # pictures that could not be read


def evaluate(
    detector: Detector,
    reader: SampleReader,
    settings: EvalSettings,
    device: torch.device,
    criterion: Criterion | None = None,
    class_ids: Sequence[int] | None = None,
    progress: bool = False,
    stop_asked: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Evaluates a detector over all processes; the main one gets the result, the others None.

    Args:
        detector: in evaluation mode, on `device`, the same on every rank.
        reader: the data set.
        settings: frame, batch, thresholds.
        device: where the detector is.
        criterion: for validation losses as well.
        class_ids: category id of each class index of the detector; the data set's own by default.
        progress: show a bar on stderr, if it takes longer than a moment.
        stop_asked: whether this process was asked to stop; looked at after each batch, and while
            the main rank computes the metrics.

    Raises:
        EvaluationStopped: on all ranks, where any was asked to stop before it was done.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=device.type == "cpu")
    data = _validation_set(reader, settings, state.process_index, state.num_processes)
    found: list[tuple[Truth, np.ndarray]] = []
    corrupt: list[Corrupt] = []
    sums: dict[str, float] = {}
    bar = tqdm(
        total=len(data),
        desc="eval",
        unit="img",
        delay=2,
        disable=not (progress and state.is_main_process),
    )
    for batch in _in_step(validation_batches(data, settings.batch, settings.workers), stop_asked):
        bar.update(len(batch.images))
        detections, losses = _forward(detector, batch, settings, device, criterion)
        corrupt += batch.corrupt
        found += [(t, _rows(d)) for t, d in zip(batch.truth, detections, strict=True)]
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss * len(batch.images)
    bar.close()
    heartbeat().beat("metrics")  # the others wait for the main rank
    everything = gather_object([(found, sums, corrupt)])
    if not state.is_main_process:
        _wait_for_main(stop_asked)
        return None
    pictures = sorted((p for part, _, _ in everything for p in part), key=lambda p: p[0].image_id)
    total = {
        name: sum(part.get(name, 0.0) for _, part, _ in everything) / len(pictures)
        for name in (sums if criterion else ())
    }
    unread = tuple(entry for _, _, part in everything for entry in part)
    compute = functools.partial(coco_metrics, pictures, reader.classes, class_ids)
    return Evaluation(_unless_stopped(compute, stop_asked), total, unread)


class EvaluationStopped(Exception):
    """The evaluation was broken off, on all ranks."""


def _in_step(batches: Iterator[Batch], stop_asked: Callable[[], bool] | None) -> Iterator[Batch]:
    """The batches, as long as no rank was asked to stop.

    All ranks look at it together after each turn. They may differ by a batch, so those that have
    none left take part until nobody has.
    """
    if stop_asked is None:
        yield from batches
        return
    from accelerate.utils import gather_object

    while True:
        heartbeat().beat("evaluation")
        batch = next(batches, None)
        if batch is not None:
            yield batch
        everyone = gather_object([(batch is None, stop_asked())])
        if any(asked for _, asked in everyone):
            raise EvaluationStopped
        if all(is_over for is_over, _ in everyone):
            return


def _unless_stopped(
    work: Callable[[], dict[str, Any]], stop_asked: Callable[[], bool] | None
) -> dict[str, Any]:
    """The result of minutes of the main rank's work, while the others are in `_wait_for_main`.

    Raises:
        EvaluationStopped: a request to stop came in between, to any rank.
    """
    if stop_asked is None:
        return work()
    outcome: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    is_done = False
    while not is_done:
        wait([outcome], timeout=LOOK_EVERY_S)
        is_done = _look_together(outcome.done(), stop_asked)
    return outcome.result()


def _wait_for_main(stop_asked: Callable[[], bool] | None) -> None:
    if stop_asked is not None:
        while not _look_together(False, stop_asked):
            pass


def _look_together(is_done: bool, stop_asked: Callable[[], bool]) -> bool:
    """Whether any rank's work is done; else it must not have been asked to stop."""
    from accelerate.utils import gather_object

    everyone = gather_object([(is_done, stop_asked())])
    if any(done for done, _ in everyone):
        return True
    if any(asked for _, asked in everyone):
        raise EvaluationStopped
    return False


def evaluate_command(
    weights: Path,
    data: str,
    images: Path | None,
    output: Path | None,
    batch: int,
    workers: int,
    shape: Literal["square", "rect"],
    cache: CacheOptions | None = None,
) -> None:
    """Evaluates exported weights on shards or on a COCO JSON; prints and writes the numbers.

    Args:
        weights: exported weights, or the folder of a run.
        data, images: shards or their URL, or a COCO JSON and the folder of its pictures.
        output: a JSON file for the numbers.
        batch: pictures in a batch, on each rank.
        workers: loader processes of each rank.
        shape: the letterbox, see `EvalSettings`.
        cache: how the shards of a URL are read.

    Raises:
        WeightsError, DataError, CheckpointError: a mistake, in one sentence.
    """
    from accelerate import PartialState

    use_cpu = not torch.cuda.is_available()
    reader = open_data(data, images, cache)
    detector, info = load_detector(exported_weights(weights))
    class_ids = match_classes(info.classes, reader.classes)
    device = PartialState(cpu=use_cpu).device
    keep_freed_memory(device)
    settings = EvalSettings(
        info.image_px, batch, workers, EvalSection().confidence, EvalSection().iou, shape
    )
    outcome = evaluate(
        detector.to(device), reader, settings, device, class_ids=class_ids, progress=True
    )
    if outcome is None:
        return
    for entry in outcome.corrupt:
        print(
            f"{entry.shard}: sample {entry.key} {entry.reason}; evaluated without it",
            file=sys.stderr,
        )
    print(format_results(outcome.results))
    if output is not None:
        write_whole(output, json.dumps(outcome.results, indent=2) + "\n")
        print(f"written to {output}")


def open_data(
    data: Path | str, images: Path | None, cache: CacheOptions | None = None
) -> SampleReader:
    """Shards or their URL, or a COCO JSON with its images."""
    if is_url(data) or Path(data).suffix != ".json":
        return ShardReader(data, cache)
    if images is None:
        raise DataError(f"--data {data} is a COCO JSON: give its pictures' folder with --images")
    return FileReader(read_coco(Path(data), images))


def _validation_set(
    reader: SampleReader, settings: EvalSettings, rank: int, world_size: int
) -> ValidationSet:
    """This rank's share of the pictures."""
    from accelerate.utils import broadcast_object_list

    if settings.letterbox == "square":
        return ValidationSet(reader, settings.frame_px, letterbox, rank, world_size)
    plan = [rectangular_batches(reader.sizes_px(), settings.frame_px, settings.batch)]
    broadcast_object_list(plan)  # see there why the main rank's is taken
    return RectangularSet(reader, settings.frame_px, letterbox, plan[0], rank, world_size)


def _forward(
    detector: Detector,
    batch: Batch,
    settings: EvalSettings,
    device: torch.device,
    criterion: Criterion | None,
) -> tuple[list[Detections], dict[str, float]]:
    """Detections in the pixels of the pictures, and the losses of the batch."""
    with torch.no_grad():
        raw = detector(batch.images.to(device).permute(0, 3, 1, 2))
        boxes, scores = detector.decode(raw)
        losses: dict[str, Tensor] = {}
        if criterion is not None:
            targets = Targets(batch.image_index, batch.labels, batch.boxes_xyxy).to(device)
            losses = criterion(detector.head, raw.levels, targets)
    found = candidates(boxes, scores, batch.frames, settings.confidence)
    detections = [picture.suppress(settings.confidence, settings.iou) for picture in found]
    return detections, {name: float(loss) for name, loss in losses.items()}


def _rows(found: Detections) -> np.ndarray:
    """`[N, 6]`: x1, y1, x2, y2, score, class."""
    columns = (found.boxes, found.scores[:, None], found.labels[:, None].float())
    return torch.cat(columns, dim=1).numpy()
