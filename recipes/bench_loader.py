"""`bench loader`: the training pipeline next to what its own decoder could do at best.

Decoding each picture once, at full size, is what no pipeline can do without; the share of that
rate that is left for whole training samples is the figure of merit. Both are taken per second of a
core's time, so that what else runs on the machine does not enter, in turns that alternate, with as
many processes each, so that a machine that slows down slows both.
"""

import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data_prep.augment import (
    PARTNERS,
    Augmentation,
    Draw,
    Layout,
    place_boxes,
    render,
)
from ..data_prep.batch import join
from ..data_prep.decode import decode_image
from ..data_prep.device import DeviceComposer
from ..data_prep.errors import DataError
from ..data_prep.loader import parts_of_batches
from ..data_prep.order import WINDOW
from ..data_prep.reader import Sample, ShardReader
from ..data_prep.ring import PREFETCH
from ..data_prep.stream import BatchPlan, TrainStream
from ..model.letterbox import fit
from ..model.memory import keep_freed_memory

FRAME_PX = (640, 640)
# YOLOv5's "low" strengths, every sample a mosaic.
STRENGTHS = Augmentation(
    mosaic=1.0,
    scale=0.5,
    translate=0.1,
    flip_left_right=0.5,
    flip_up_down=0.0,
    hue=0.015,
    saturation=0.7,
    value=0.4,
)
MICRO_BATCH = 16
PICTURES = 256  # for the decoder's turns, at most
STEPS = 50  # that decodes are counted over
TURNS = 5


@dataclass(frozen=True)
class LoaderSpeed:
    """The pipeline at one number of workers. Medians of turns."""

    workers: int
    composed_on: str  # "cpu": by the workers; "device": by the training device, not counted here
    images_per_s: float  # of wall time, all workers
    images_per_s_per_core: float  # of the workers' time on their cores
    decode_per_s_per_core: float  # of as many processes that only decode
    ratio_to_decode: float  # of the two before
    rank_ms: float  # that the rank's own process spends on an image
    worker_mib: float  # memory of one worker that it shares with nobody


@dataclass(frozen=True)
class LoaderReport:
    """All that `bench loader` found. The ratios are those of one worker."""

    ratio_to_decode_cpu: float
    ratio_to_decode_device: float
    samples: int
    decodes_per_sample: float  # from a run's first step on, windows filled
    first_batch_s: float  # from opening the shards
    stage_ms: dict[str, float]  # of one sample, in this process
    speeds: list[LoaderSpeed]


class _CountingReader(ShardReader):
    decoded = 0

    def decode(self, position: int, out: np.ndarray | None = None) -> Sample:
        self.decoded += 1
        return super().decode(position, out)


def bench_loader(shards: str, batches: int, workers: Sequence[int] = (1, 2)) -> LoaderReport:
    """Times the pipeline over shards.

    Args:
        shards: folder, with at least one micro-batch of samples.
        batches: micro-batches of a turn.
        workers: how many loader processes, one setting after the other.

    Raises:
        DataError: the shards can't be read.
    """
    keep_freed_memory(torch.device("cpu"))
    torch.set_num_threads(1)  # as launchers have it; threads that wait for work look busy
    started_s = time.perf_counter()
    reader = _CountingReader(shards)
    if len(reader) < MICRO_BATCH:
        raise DataError(f"{shards}: has {len(reader)} samples; give shards of at least 16")
    parts = iter(_stream(reader, on_device=False))
    next(parts)
    first_batch_s = time.perf_counter() - started_s
    for _ in range(STEPS - 1):
        next(parts)
    encoded = [reader.read(i)[0] for i in range(min(PICTURES, len(reader)))]
    settings = [(n, on_device) for n in workers for on_device in (False, True)]
    bar = tqdm(total=len(settings) * TURNS, desc="bench loader", unit="turn", delay=2)
    speeds = [
        _speed(reader, encoded, n, on_device, batches, bar.update) for n, on_device in settings
    ]
    bar.close()
    one_worker = {s.composed_on: s.ratio_to_decode for s in speeds if s.workers == workers[0]}
    return LoaderReport(
        ratio_to_decode_cpu=one_worker["cpu"],
        ratio_to_decode_device=one_worker["device"],
        samples=len(reader),
        decodes_per_sample=round(reader.decoded / (STEPS * MICRO_BATCH), 3),
        first_batch_s=round(first_batch_s, 3),
        stage_ms=_stages(reader, encoded),
        speeds=speeds,
    )


def _stream(reader: ShardReader, on_device: bool) -> TrainStream:
    plan = BatchPlan(MICRO_BATCH, MICRO_BATCH, 0, 1)
    return TrainStream(reader, plan, 0, 0, FRAME_PX, lambda _: STRENGTHS, fit, on_device)


def _batches(stream: TrainStream, workers: int) -> Generator[None, None, None]:
    """Micro-batches as the cores leave them: joined, or taken to where a device composes them."""
    composer = DeviceComposer(stream, torch.device("cpu"))
    for parts, pixels in parts_of_batches(stream, workers):
        if stream.on_device:
            composer.windows.clear()
            composer.keep(parts, pixels)
        else:
            join(parts, pixels)
        yield


def _speed(
    reader: ShardReader,
    encoded: Sequence[bytes],
    workers: int,
    on_device: bool,
    batches: int,
    advance: Callable[[], object],
) -> LoaderSpeed:
    """Turns of decoding alone and of the pipeline, in as many processes each."""
    made = _batches(_stream(reader, on_device), workers)
    for _ in range(WINDOW):  # until every lane's window is full
        next(made)
    children = [child.pid for child in multiprocessing.active_children()]
    memory_mib = [_own_mib(pid) for pid in children]
    images = batches * MICRO_BATCH
    wall, own, pipeline, decoding = [], [], [], []
    # Forked, so that the pictures need not be sent.
    with multiprocessing.get_context("fork").Pool(workers, _hold, (encoded,)) as pool:
        shares = [range(i, len(encoded), workers) for i in range(workers)]
        for _ in range(TURNS):
            pool.map(_decode, shares, chunksize=1)  # while the pipeline still fills its queue
            decoding.append(len(encoded) / sum(pool.map(_decode, shares, chunksize=1)))
            for _ in range(2 * PREFETCH):  # what was made meanwhile
                next(made)
            started_s, own_s = time.perf_counter(), time.process_time()
            before_s = sum(map(_core_s, children))
            for _ in range(batches):
                next(made)
            pipeline.append(images / (sum(map(_core_s, children)) - before_s))
            wall.append(images / (time.perf_counter() - started_s))
            own.append((time.process_time() - own_s) / images)
            advance()
    made.close()
    rate, decode = statistics.median(pipeline), statistics.median(decoding)
    return LoaderSpeed(
        workers=workers,
        composed_on="device" if on_device else "cpu",
        images_per_s=round(statistics.median(wall), 1),
        images_per_s_per_core=round(rate, 1),
        decode_per_s_per_core=round(decode, 1),
        ratio_to_decode=round(rate / decode, 3),
        rank_ms=round(statistics.median(own) * 1e3, 3),
        worker_mib=round(statistics.mean(memory_mib), 1),
    )


_held: Sequence[bytes] = ()  # in a process that only decodes: the pictures


def _hold(encoded: Sequence[bytes]) -> None:
    global _held
    _held = encoded
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool's way to end it
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _decode(positions: range) -> float:
    """Seconds of core time that these pictures take."""
    started_s = time.process_time()
    for position in positions:
        decode_image(_held[position])
    return time.process_time() - started_s


def _core_s(pid: int | None) -> float:
    """Seconds that a process has been on a core, all of its threads."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text(encoding="ascii").split()[0]) for path in threads) / 1e9


def _own_mib(pid: int | None) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _stages(reader: ShardReader, encoded: Sequence[bytes]) -> dict[str, float]:
    """Milliseconds of each stage of a sample, one after the other in this process."""
    count = len(encoded)
    stream = _stream(reader, on_device=False)
    kept = [stream.decode(i).picture for i in range(count)]
    pictures = [[kept[j % count] for j in range(i, i + 1 + PARTNERS)] for i in range(count)]
    layouts: list[Layout] = []

    def compose(i: int) -> None:
        draw = Draw(STRENGTHS, WINDOW, np.random.default_rng((0, 0, i)))
        sizes = [(p.image.shape[0], p.image.shape[1]) for p in pictures[i]]
        layouts.append(draw.layout(sizes, FRAME_PX))

    out = np.empty((*FRAME_PX, 3), np.uint8)
    stages: dict[str, Callable[[int], object]] = {
        "read": reader.read,
        "decode": lambda i: decode_image(encoded[i]),
        "draw and lay out": compose,
        "boxes": lambda i: place_boxes(layouts[i], pictures[i], FRAME_PX),
        "pixels": lambda i: render(layouts[i], [p.image for p in pictures[i]], FRAME_PX, out),
    }
    result = {}
    for name, stage in stages.items():
        started_s = time.perf_counter()
        for i in range(count):
            stage(i)
        result[name] = round((time.perf_counter() - started_s) / count * 1e3, 3)
    return result


def format_loader(report: LoaderReport) -> str:
    """Tables for a terminal."""
    height, width = FRAME_PX
    lines = [
        f"{report.samples} samples, {width}x{height} px, mosaic, scale, flip, colour: "
        f"{report.decodes_per_sample} decodes a sample, first batch after {report.first_batch_s} s",
        "",
        "workers composed on    img/s   a core decoding  share rank ms   MiB",
    ]
    lines += [
        f"{s.workers:>7} {s.composed_on:11} {s.images_per_s:>8.1f} {s.images_per_s_per_core:>8.1f} "
        f"{s.decode_per_s_per_core:>8.1f} {s.ratio_to_decode:>6.2f} {s.rank_ms:>7.2f} "
        f"{s.worker_mib:>5.0f}"
        for s in report.speeds
    ]
    lines += [
        "",
        "img/s: of wall time, all workers; a core: of a second of a worker's core time; decoding:",
        "that of the same decoder alone, same run; rank ms: of the rank's own process, an image",
    ]
    stages = ", ".join(f"{name} {ms:.2f}" for name, ms in report.stage_ms.items())
    return "\n".join([*lines, f"ms a sample in one process: {stages}"])


def as_record(report: LoaderReport) -> dict[str, Any]:
    """For JSON."""
    return asdict(report)
