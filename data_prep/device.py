"""Composing samples on the training device: what `augment.render` does, in torch.

Workers send each decoded picture once; the rank keeps every lane's window of them on the device
and makes the samples from it, with the numbers that a worker would have drawn.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import FILL, Picture
from .batch import Batch, Part, Place, make_batch
from .order import WINDOW
from .stream import Kept, Made, TrainStream


class DeviceComposer:
    """Makes the micro-batches of a stream, in their order.

    Args:
        stream: whose parts come in; it draws and places the boxes.
        device: where pictures are kept and pixels made.
    """

    def __init__(self, stream: TrainStream, device: torch.device):
        self.stream, self.device = stream, device
        self.windows: dict[Place, Kept] = {}
        self._done = 0  # micro-batches

    def compose(self, parts: Sequence[Part], pixels: Sequence[Tensor]) -> Batch:
        """The next micro-batch.

        Args:
            parts: pictures, all that it needs beside those of parts before.
            pixels: of each part, `[F, H, W, 3]` uint8; they are copied.
        """
        self.keep(parts, pixels)
        steps, turn = divmod(self._done, self.stream.plan.accumulation)
        step = self.stream.start_step + steps
        self._done += 1
        made = []
        for lane in self.stream.plan.lanes(turn):
            made.append(self.stream.make(lane, step, functools.partial(self._kept, lane)))
            self.windows.pop((lane, step - WINDOW), None)  # no later sample takes it
        return make_batch(
            torch.stack([self._render(sample) for sample in made]),
            [sample.boxes_xyxy for sample in made],
            [sample.labels for sample in made],
            [sample.image_id for sample in made],
            corrupt=tuple(corrupt for part in parts for corrupt in part.corrupt),
        )

    def _kept(self, lane: int, step: int) -> Kept:
        return self.windows[lane, step]

    def keep(self, parts: Sequence[Part], pixels: Sequence[Tensor]) -> None:
        """Takes pictures into the windows; the arguments are those of `compose`."""
        for part, frames in zip(parts, pixels, strict=True):
            for i, (place, (height, width)) in enumerate(zip(part.places, part.sizes, strict=True)):
                image = frames[i].view(-1)[: height * width * 3].view(height, width, 3)
                picture = Picture(self._moved(image), part.boxes_xyxy[i], part.labels[i])
                self.windows[place] = Kept(picture, part.image_ids[i])

    def _moved(self, image: Tensor) -> Tensor:
        """A copy on the device: the workers write over the original."""
        if self.device.type == "cpu":
            return image.clone()
        return image.pin_memory().to(self.device, non_blocking=True)

    def _render(self, sample: Made) -> Tensor:
        """`[H, W, 3]` uint8."""
        canvas = torch.full((3, *self.stream.frame_px), float(FILL), device=self.device)
        for paste in sample.layout.pastes:
            (x1, y1, x2, y2), (left, top, right, bottom) = paste.source, paste.target
            part = sample.pictures[paste.picture].image[y1:y2, x1:x2]
            canvas[:, top:bottom, left:right] = F.interpolate(
                part.permute(2, 0, 1)[None].float(),
                (bottom - top, right - left),
                mode="bilinear",
                align_corners=False,
            )[0]
        # Rounded in between, as where there are only bytes.
        colour = torch.from_numpy(sample.layout.colour).to(self.device)
        canvas = (colour @ canvas.round().flatten(1)).view_as(canvas).round().clamp(0, 255)
        axes = [axis for axis, flip in zip((2, 1), sample.layout.mirrored, strict=True) if flip]
        return canvas.to(torch.uint8).flip(axes).permute(1, 2, 0)
