"""The letterbox: the one way by which a picture becomes a network input, and boxes come back.

Training, evaluation, the demo and export all use this function.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

FILL = 114  # YOLOv5's grey; the mosaic uses it too


@dataclass(frozen=True)
class Letterbox:
    """Where a picture lies in the input: input = picture · scale + offset, in pixels."""

    scale: float
    left_px: int
    top_px: int
    width_px: int  # of the picture
    height_px: int

    def to_input(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """Boxes `[N, 4]` in picture pixels → in input pixels."""
        offset = np.array([self.left_px, self.top_px] * 2, dtype=np.float32)
        return (boxes_xyxy * self.scale + offset).astype(np.float32)

    def to_picture(self, boxes_xyxy: torch.Tensor) -> torch.Tensor:
        """Boxes `[N, 4]` in input pixels → in picture pixels, clipped to the picture."""
        offset = boxes_xyxy.new_tensor([self.left_px, self.top_px] * 2)
        limit = boxes_xyxy.new_tensor([self.width_px, self.height_px] * 2)
        return ((boxes_xyxy - offset) / self.scale).clamp(min=0).minimum(limit)


def letterbox(
    image: np.ndarray, height_px: int, width_px: int, fit_px: tuple[int, int] | None = None
) -> tuple[np.ndarray, Letterbox]:
    """Scales a picture into a frame, keeping its shape, centred on grey.

    Args:
        image: `[H, W, 3]` uint8.
        height_px, width_px: the frame.
        fit_px: height and width that the picture is scaled to fit, where that is less than the
            frame and the rest is to stay grey.

    Returns:
        The frame `[height_px, width_px, 3]` uint8, and where the picture lies in it.
    """
    height, width = image.shape[:2]
    fit_height, fit_width = fit_px or (height_px, width_px)
    image, scale = fit(image, min(height_px, fit_height), min(width_px, fit_width))
    new_height, new_width = image.shape[:2]
    left, top = (width_px - new_width) // 2, (height_px - new_height) // 2
    frame = np.full((height_px, width_px, 3), FILL, dtype=np.uint8)
    frame[top : top + new_height, left : left + new_width] = image
    return frame, Letterbox(scale, left, top, width, height)


def fit(image: np.ndarray, height_px: int, width_px: int) -> tuple[np.ndarray, float]:
    """Scales a picture to fit a frame, keeping its shape; of its own size it is left as it is.

    Args:
        image: `[H, W, 3]` uint8.
        height_px, width_px: the frame.

    Returns:
        The picture, and what it was multiplied by.
    """
    height, width = image.shape[:2]
    scale = min(height_px / height, width_px / width)
    # A sliver of a picture still gets one pixel.
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    if (new_height, new_width) != (height, width):
        # Writable, or torch warns: Pillow's arrays are not.
        pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
        # antialias averages when shrinking: a large photo shrinks without moiré.
        pixels = F.interpolate(
            pixels, (new_height, new_width), mode="bilinear", antialias=scale < 1
        )
        image = pixels[0].permute(1, 2, 0).contiguous().numpy()
    return image, scale
