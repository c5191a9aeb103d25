"""Pictures in, detections out: the network with all that belongs before and after it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .detector import Detector
from .letterbox import letterbox
from .postprocess import Candidates, Detections, candidates
from .weights import WeightsInfo, load_detector


class Predictor:
    """Runs a detector on pictures of any size.

    `candidates` runs the network; `suppress` of what it returns then filters for any confidence
    and IoU without running it again.
    """

    def __init__(self, detector: Detector, info: WeightsInfo, device: str | None = None):
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
    ) -> list[Candidates]:
        """RGB pictures `[H, W, 3]` uint8 → every box above `confidence`, before suppression."""
        framed = [letterbox(picture, *self.info.image_px) for picture in pictures]
        images = torch.from_numpy(np.stack([image for image, _ in framed])).to(self.device)
        boxes, scores = self.detector.decode(self.detector(images.permute(0, 3, 1, 2)))
        return candidates(boxes, scores, [frame for _, frame in framed], confidence)

    def __call__(
        self, pictures: Sequence[np.ndarray], confidence: float = 0.25, iou: float = 0.45
    ) -> list[Detections]:
        """RGB pictures → their detections, best first."""
        found = self.candidates(pictures, confidence)
        return [picture.suppress(confidence, iou) for picture in found]
