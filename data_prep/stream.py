"""Shards → batches: the deterministic, elastic training stream.

Every slot of the global batch is a *lane*. Lane j yields the j-th sample of every global batch;
an epoch's permutation deals blocks of neighbouring samples to the lanes, equally many each; a
lane keeps its last few decoded pictures, and mosaic partners come from there alone. A rank owns
whole micro-batches of lanes and its workers own whole lanes, so nobody's work depends on how many
there are: world size and worker count change who makes a sample, never the sample.

The position is one integer, the number of global batches done. All randomness of a sample is
keyed by (seed, epoch, its index in the epoch). The ragged end of an epoch, fewer samples than a
global batch, is dropped; the next permutation drops others. A corrupt sample is replaced by the
next one in the shards that is not, wherever it is met.

With `on_device` the workers only decode, and the rank composes on its training device (`device`):
the same numbers, boxes and pictures, and most of the work gone from the cores.

G global batch, m micro-batch, S steps an epoch, N boxes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .augment import Augmentation, Draw, Layout, Picture, place_boxes, render
from .batch import Corrupt, Part, Place
from .errors import CorruptSampleError, DataError
from .order import WINDOW, EpochOrder
from .reader import Sample, ShardReader
from .ring import FrameRing

SUBSTITUTES = 64  # corrupt samples in a row that are put down to bad luck

# Scales a picture [H, W, 3] to fit a frame and tells by how much: `model.letterbox.fit`, passed in
# because rooms do not import each other.
Fit = Callable[[np.ndarray, int, int], tuple[np.ndarray, float]]


@dataclass(frozen=True)
class Kept:
    """A decoded picture in a lane's window."""

    picture: Picture
    image_id: int


class Lane:
    """One slot of the global batch: its pictures by step, and its window of the last ones.

    Pictures from before the first step of a run are decoded when a mosaic takes them.
    """

    def __init__(self, lane: int, order: EpochOrder, decode: Callable[[int], Kept]):
        self.lane, self.order, self.decode = lane, order, decode
        self.window: dict[int, Kept] = {}

    def at(self, step: int) -> Kept:
        """The picture of a step, that of the sample being made or one at most `WINDOW` before."""
        if step not in self.window:
            self.window[step] = self.decode(self.order.lane(self.lane, step))
        return self.window[step]

    def forget_before(self, step: int) -> None:
        """Drops what no later sample can take."""
        for old in [s for s in self.window if s < step - WINDOW]:
            del self.window[old]


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


@dataclass(frozen=True)
class Made:
    """A sample all but its pixels."""

    pictures: tuple[Picture, ...]
    layout: Layout
    boxes_xyxy: np.ndarray  # [N, 4] float32, pixels of the frame
    labels: np.ndarray  # [N] int64
    image_id: int


class TrainStream(IterableDataset[Part]):
    """Yields the parts of this rank's training micro-batches from a global step on, without end.

    Under a DataLoader with workers each item is the part that one worker owns, else all of it;
    `loader.training_batches` makes batches of them.

    Args:
        reader: the training shards.
        plan: which lanes are this rank's.
        seed: of order and augmentation.
        start_step: global batches done.
        frame_px: height and width of a sample.
        augmentation_at: strengths by global step.
        fit: makes a picture smaller.
        on_device: whether parts hold decoded pictures, from which a device composes.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: BatchPlan,
        seed: int,
        start_step: int,
        frame_px: tuple[int, int],
        augmentation_at: Callable[[int], Augmentation],
        fit: Fit,
        on_device: bool = False,
    ):
        self.reader, self.plan, self.seed, self.start_step = reader, plan, seed, start_step
        self.frame_px, self.augmentation_at, self.fit = frame_px, augmentation_at, fit
        self.on_device = on_device
        self.order = EpochOrder(len(reader), plan.global_batch, seed)
        self.ring: FrameRing | None = None  # set by the loader, before workers start
        self._bad: set[int] = set()  # positions of corrupt samples, as far as known here
        self._corrupt: list[Corrupt] = []  # since the last part

    def __iter__(self) -> Iterator[Part]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        lanes: dict[int, Lane] = {}
        sent: set[Place] = set()
        step = self.start_step
        while True:
            for turn in range(self.plan.accumulation):
                own = self.plan.lanes(turn)[first::stride]
                if self.on_device:
                    yield self._pictures(own, step, sent)
                else:
                    for j in own:
                        lanes.setdefault(j, Lane(j, self.order, self.decode)).forget_before(step)
                    yield self._samples([self.make(j, step, lanes[j].at) for j in own])
            step += 1

    def decode(self, position: int, out: np.ndarray | None = None) -> Kept:
        """A picture, made smaller where it is larger than the frame.

        Args:
            position: in the shards.
            out: bytes for the picture's pixels, if they fit; else they are elsewhere.
        """
        sample = self._readable(position, out)
        image, scale = sample.image, 1.0
        if image.shape[0] > self.frame_px[0] or image.shape[1] > self.frame_px[1]:
            image, scale = self.fit(image, *self.frame_px)
        # A crowd box marks many objects at once: it is no target, only a mercy in evaluation.
        keep = ~sample.crowd
        boxes = (sample.boxes_xyxy[keep] * scale).astype(np.float32)
        return Kept(Picture(image, boxes, sample.labels[keep]), sample.image_id)

    def _readable(self, position: int, out: np.ndarray | None) -> Sample:
        """The sample there, or the first one behind it that is not corrupt."""
        last: CorruptSampleError | str = "as was found before"
        for behind in range(SUBSTITUTES):
            candidate = (position + behind) % len(self.reader)
            if candidate in self._bad:
                continue
            try:
                return self.reader.decode(candidate, out)
            except CorruptSampleError as error:
                self._bad.add(candidate)
                self._corrupt.append(Corrupt(error.shard, error.key, error.reason))
                last = error
        raise DataError(f"{SUBSTITUTES} samples in a row can't be used: {last}")

    def draw(self, lane: int, step: int) -> Draw:
        """The random numbers of a sample."""
        epoch, within = divmod(step, self.order.steps)
        index = within * self.plan.global_batch + lane
        rng = np.random.default_rng((self.seed, epoch, index))
        return Draw(self.augmentation_at(step), WINDOW, rng)

    def make(self, lane: int, step: int, kept_at: Callable[[int], Kept]) -> Made:
        """Everything about a sample but its pixels, given its lane's pictures by step."""
        draw = self.draw(lane, step)
        kept = [kept_at(s) for s in (step, *_partner_steps(draw, step))]
        pictures = tuple(k.picture for k in kept)
        layout = draw.layout([picture.image.shape[:2] for picture in pictures], self.frame_px)
        boxes, labels = place_boxes(layout, pictures, self.frame_px)
        return Made(pictures, layout, boxes, labels, kept[0].image_id)

    def _samples(self, made: list[Made]) -> Part:
        """Finished samples."""
        pixels, is_shared = self._pixels(len(made))
        for out, sample in zip(pixels, made, strict=True):
            render(sample.layout, [p.image for p in sample.pictures], self.frame_px, out)
        return Part(
            boxes_xyxy=[sample.boxes_xyxy for sample in made],
            labels=[sample.labels for sample in made],
            image_ids=[sample.image_id for sample in made],
            corrupt=self._take_corrupt(),
            pixels=None if is_shared else pixels,
        )

    def _pictures(self, lanes: range, step: int, sent: set[Place]) -> Part:
        """The decoded pictures that samples of these lanes need and the device does not have."""
        places = [(lane, step) for lane in lanes]
        if step < self.start_step + WINDOW:
            # Later the windows hold nothing from before the start.
            for lane in lanes:
                older = set(_partner_steps(self.draw(lane, step), step))
                new = {(lane, s) for s in older if s < self.start_step} - sent
                places += sorted(new)
                sent |= new
        pixels, is_shared = self._pixels(len(places))
        kept = []
        for (lane, at), frame in zip(places, pixels.reshape(len(places), -1), strict=True):
            kept.append(self.decode(self.order.lane(lane, at), out=frame))
            image = kept[-1].picture.image
            if not np.shares_memory(image, frame):
                frame[: image.size] = image.ravel()
        return Part(
            boxes_xyxy=[k.picture.boxes_xyxy for k in kept],
            labels=[k.picture.labels for k in kept],
            image_ids=[k.image_id for k in kept],
            corrupt=self._take_corrupt(),
            pixels=None if is_shared else pixels,
            places=tuple(places),
            sizes=tuple(k.picture.image.shape[:2] for k in kept),
        )

    def _pixels(self, frames: int) -> tuple[np.ndarray, bool]:
        """Memory for a part's pixels `[frames, H, W, 3]`, and whether the rank sees it too."""
        shared = self.ring.next_slot(frames) if self.ring and get_worker_info() else None
        if shared is not None:
            return shared, True
        return np.empty((frames, *self.frame_px, 3), np.uint8), False

    def _take_corrupt(self) -> tuple[Corrupt, ...]:
        corrupt, self._corrupt = tuple(self._corrupt), []
        return corrupt


def _partner_steps(draw: Draw, step: int) -> list[int]:
    return [step - WINDOW + i for i in draw.partners] if draw.is_mosaic else []
