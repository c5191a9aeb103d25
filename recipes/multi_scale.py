"""Multi-scale training: every global step in a frame of its own size, the same on all ranks.

B pictures, N boxes.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .config import Recipe

STRIDE_PX = 32  # a frame's sides are multiples of the detectors' largest stride
SMALLEST_PX = 64
KEY = 0x5CA1E  # sets these draws apart from the stream's


def frame_at(recipe: Recipe, step: int) -> tuple[int, int]:
    """Height and width of a step's frame: `image_px` times a draw from 1 ± multi_scale.

    The draw is keyed by (seed, step), so that a resume and another world size give it again.
    """
    reach = recipe.augment.multi_scale
    if not reach:
        return recipe.data.image_px
    draw = np.random.default_rng((recipe.seed, step, KEY)).uniform(1 - reach, 1 + reach)
    return _scaled(recipe, draw)


def largest_frame(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the largest frame that may come."""
    return _scaled(recipe, 1 + recipe.augment.multi_scale)


def _scaled(recipe: Recipe, factor: float) -> tuple[int, int]:
    height, width = (
        max(SMALLEST_PX, round(side * factor / STRIDE_PX) * STRIDE_PX)
        for side in recipe.data.image_px
    )
    return height, width


def rescale(images: Tensor, boxes_xyxy: Tensor, frame_px: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scales a micro-batch into another frame.

    Args:
        images: `[B, 3, H, W]` uint8.
        boxes_xyxy: `[N, 4]` pixels.
        frame_px: height and width wanted.

    Returns:
        The images, floats in [0, 1] unless they have the size already, and the boxes.
    """
    height, width = images.shape[-2:]
    if (height, width) == tuple(frame_px):
        return images, boxes_xyxy
    scaled = F.interpolate(images.float() / 255, frame_px, mode="bilinear", antialias=True)
    factor = boxes_xyxy.new_tensor((frame_px[1] / width, frame_px[0] / height) * 2)
    return scaled, boxes_xyxy * factor
