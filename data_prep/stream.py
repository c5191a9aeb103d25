"""Shards → batches: the deterministic, elastic training stream.

Every slot of the global batch is a *lane*. Lane j yields the j-th sample of every global batch;
an epoch's permutation deals blocks of neighbouring samples to the lanes, equally many each; a
lane keeps its last few decoded pictures, and mosaic partners come from there alone. A rank owns
whole micro-batches of lanes and its workers own whole lanes, so nobody's work depends on how many
there are: world size and worker count change who makes a sample, never the sample.

The position is one integer, the number of global batches done. All randomness of a sample is
keyed by (seed, epoch, its index in the epoch). The ragged end of an epoch, fewer samples than a
global batch, is dropped; the next permutation drops others.

G global batch, m micro-batch, S steps an epoch, N boxes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .augment import Augmentation, Picture, augment
from .errors import DataError
from .reader import ShardReader
from .workers import load

BLOCK = 8  # neighbouring samples that a lane reads one after the other
WINDOW = 8  # decoded pictures that a lane keeps for its mosaics

# Scales a picture [H, W, 3] into a frame and tells where it lies there: `model.letterbox`,
# passed in because rooms do not import each other.
Letterbox = Callable[..., tuple[np.ndarray, Any]]


@dataclass(frozen=True)
class Truth:
    """The annotations of one picture in its own pixels, crowds included. N boxes."""

    image_id: int
    width_px: int
    height_px: int
    boxes_xyxy: np.ndarray  # [N, 4]
    labels: np.ndarray  # [N]
    crowd: np.ndarray  # [N] bool
    area: np.ndarray  # [N]


@dataclass(frozen=True)
class Batch:
    """A micro-batch. B pictures of one size, N boxes in all."""

    images: Tensor  # [B, H, W, 3] uint8; the device permutes it to channels first
    image_index: Tensor  # [N] int64, which picture a box belongs to
    labels: Tensor  # [N] int64, class index
    boxes_xyxy: Tensor  # [N, 4] float32, pixels of the frame
    image_ids: tuple[int, ...]  # [B], as in the annotations
    # Validation only: where each picture lies in its frame, and its annotations as they are.
    frames: tuple[Any, ...] = ()  # [B]
    truth: tuple[Truth, ...] = ()  # [B]


def collate(pictures: Sequence[Picture], image_ids: Sequence[int]) -> Batch:
    """Joins pictures of one size into a micro-batch."""
    return Batch(
        images=torch.from_numpy(np.stack([p.image for p in pictures])),
        image_index=torch.from_numpy(
            np.repeat(np.arange(len(pictures)), [len(p.labels) for p in pictures])
        ),
        labels=torch.from_numpy(np.concatenate([p.labels for p in pictures])),
        boxes_xyxy=torch.from_numpy(np.concatenate([p.boxes_xyxy for p in pictures])),
        image_ids=tuple(image_ids),
    )


class EpochOrder:
    """The order of an epoch, dealt to the lanes: a pure function of size, seed and epoch."""

    def __init__(self, samples: int, global_batch: int, seed: int):
        if samples < global_batch:
            raise DataError(
                f"batch.global is {global_batch}, but the training shards hold {samples} samples; "
                "take a global batch of at most that"
            )
        self.samples, self.global_batch, self.seed = samples, global_batch, seed
        self.steps = samples // global_batch
        self._cached: dict[int, np.ndarray] = {}

    def lane(self, lane: int, step: int) -> int:
        """The position of the sample that lane `lane` yields at global step `step`.

        Steps below zero are those of epochs before the first: they fill the first windows.
        """
        epoch, within = divmod(step, self.steps)
        return int(self._dealt(epoch)[lane, within])

    def _dealt(self, epoch: int) -> np.ndarray:
        """`[G, S]` positions."""
        if epoch not in self._cached:
            # Seeds must not be negative. Epochs are, down to where the first windows begin.
            rng = np.random.default_rng((self.seed, (epoch + 1) % 2**32))
            # Blocks start at another offset each epoch, so neighbours are not always the same.
            edges = np.arange(rng.integers(BLOCK), self.samples, BLOCK)
            blocks = np.split(np.arange(self.samples, dtype=np.int32), edges)
            order = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
            dealt = order[: self.global_batch * self.steps].reshape(self.global_batch, self.steps)
            if len(self._cached) == 2:  # a window reaches from one epoch into the one before
                del self._cached[next(iter(self._cached))]
            self._cached[epoch] = dealt
        return self._cached[epoch]


class Lane:
    """One slot of the global batch: its pictures in order, and its window of the last ones."""

    def __init__(self, lane: int, order: EpochOrder, decode: Callable[[int], tuple[Picture, int]]):
        self.lane, self.order, self.decode = lane, order, decode
        self.window: deque[Picture] = deque(maxlen=WINDOW)
        self.next_step: int | None = None

    def at(self, step: int) -> tuple[Picture, int, list[Picture]]:
        """The picture of a step, its image id, and the pictures of the steps before."""
        if self.next_step != step:  # the start of a run or a resume: refill the window
            self.window.clear()
            for before in range(step - WINDOW, step):
                self.window.append(self.decode(self.order.lane(self.lane, before))[0])
        primary, image_id = self.decode(self.order.lane(self.lane, step))
        partners = list(self.window)
        self.window.append(primary)
        self.next_step = step + 1
        return primary, image_id, partners


@dataclass(frozen=True)
class BatchPlan:
    """Who makes which lanes: the global batch is cut into the same micro-batches everywhere."""

    global_batch: int
    micro_batch: int
    rank: int
    world_size: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in a global step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def lanes(self, turn: int) -> range:
        """The lanes of this rank's `turn`-th micro-batch of a global step."""
        first = (turn * self.world_size + self.rank) * self.micro_batch
        return range(first, first + self.micro_batch)


class TrainStream(IterableDataset[Batch]):
    """Yields this rank's training micro-batches from a global step on, without end.

    Under a DataLoader with workers each item is the part of a micro-batch that one worker owns;
    `training_batches` joins them.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: BatchPlan,
        seed: int,
        start_step: int,
        frame_px: tuple[int, int],
        augmentation_at: Callable[[int], Augmentation],
        letterbox: Letterbox,
    ):
        self.reader, self.plan, self.seed, self.start_step = reader, plan, seed, start_step
        self.frame_px, self.augmentation_at, self.letterbox = frame_px, augmentation_at, letterbox
        self.order = EpochOrder(len(reader), plan.global_batch, seed)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        lanes: dict[int, Lane] = {}
        step = self.start_step
        while True:
            for turn in range(self.plan.accumulation):
                part = []
                for j in self.plan.lanes(turn)[first::stride]:
                    lane = lanes.setdefault(j, Lane(j, self.order, self._decode))
                    part.append(self._sample(lane, step))
                yield collate([p for p, _ in part], [i for _, i in part])
            step += 1

    def _decode(self, position: int) -> tuple[Picture, int]:
        """A picture scaled to the frame, without the grey around it."""
        sample = self.reader.decode(position)
        framed, where = self.letterbox(sample.image, *self.frame_px)
        boxes = where.to_input(sample.boxes_xyxy)
        left, top = where.left_px, where.top_px
        height, width = (round(side * where.scale) for side in sample.image.shape[:2])
        image = framed[top : top + max(1, height), left : left + max(1, width)]
        # A crowd box marks many objects at once: it is no target, only a mercy in evaluation.
        keep = ~sample.crowd
        boxes = (boxes - np.array([left, top] * 2, np.float32))[keep]
        return Picture(image, boxes, sample.labels[keep]), sample.image_id

    def _sample(self, lane: Lane, step: int) -> tuple[Picture, int]:
        primary, image_id, partners = lane.at(step)
        epoch, within = divmod(step, self.order.steps)
        index = within * self.plan.global_batch + lane.lane
        rng = np.random.default_rng((self.seed, epoch, index))
        picture = augment(primary, partners, *self.frame_px, self.augmentation_at(step), rng)
        return picture, image_id


def training_batches(stream: TrainStream, workers: int) -> Iterator[Batch]:
    """Iterates whole micro-batches of this rank, made by `workers` processes (0: by this one)."""
    workers = min(workers, stream.plan.micro_batch)
    pin = torch.cuda.is_available()
    parts = load(stream, workers, batch_size=None)
    while True:
        # The loader takes one part from each worker in turn, so `workers` parts are one batch.
        yield _interleave([next(parts) for _ in range(max(1, workers))], pin)


def _interleave(parts: Sequence[Batch], pin: bool) -> Batch:
    """Part i holds slots i, i + n, i + 2n, … of the micro-batch.

    Pinned, the pixels go to a GPU while it works. The loader's own pinning does not see into a
    `Batch`, and its parts are not the micro-batch yet.
    """
    n = len(parts)
    if n == 1 and not pin:
        return parts[0]
    size = sum(len(part.images) for part in parts)
    shape = (size, *parts[0].images.shape[1:])
    images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
    ids = [0] * size
    for i, part in enumerate(parts):
        images[i::n] = part.images
        ids[i::n] = part.image_ids
    index = torch.cat([part.image_index * n + i for i, part in enumerate(parts)])
    order = torch.argsort(index, stable=True)
    return Batch(
        images=images,
        image_index=index[order],
        labels=torch.cat([part.labels for part in parts])[order],
        boxes_xyxy=torch.cat([part.boxes_xyxy for part in parts])[order],
        image_ids=tuple(ids),
    )
