"""Pictures in, detections out: the network with all that belongs before and after it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .detector import ConvNeXtYOLO
from .letterbox import letterbox
from .postprocess import Detections, candidates, suppress, to_picture
from .weights import WeightsInfo, load_detector


class Predictor:
    """Runs a detector on pictures of any size.

    `candidates` runs the network; `suppress` (of `postprocess`) then filters its result for any
    confidence and IoU without running it again.
    """

    def __init__(self, detector: ConvNeXtYOLO, info: WeightsInfo, device: str | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.detector = detector.to(self.device).eval()
        self.info = info

    @classmethod
    def load(cls, path: Path, device: str | None = None) -> "Predictor":
        """Loads exported weights. Raises `WeightsError` with one sentence."""
        return cls(*load_detector(path), device)

    @torch.inference_mode()
    def candidates(
        self, pictures: Sequence[np.ndarray], confidence: float = 0.01
    ) -> list[Detections]:
        """RGB pictures `[H, W, 3]` uint8 → every box above `confidence`, before suppression.

        Boxes are in the pixels of each picture.
        """
        framed = [letterbox(picture, *self.info.image_px) for picture in pictures]
        images = torch.from_numpy(np.stack([image for image, _ in framed])).to(self.device)
        raw = self.detector(images.permute(0, 3, 1, 2))
        boxes, scores = (part.cpu() for part in self.detector.decode(raw))
        return [
            to_picture(candidates(b, s, confidence), frame)
            for b, s, (_, frame) in zip(boxes, scores, framed, strict=True)
        ]

    def __call__(
        self, pictures: Sequence[np.ndarray], confidence: float = 0.25, iou: float = 0.45
    ) -> list[Detections]:
        """RGB pictures → their detections, best first."""
        return [suppress(found, confidence, iou) for found in self.candidates(pictures, confidence)]
