"""MFU: what share of a GPU's arithmetic the training does (Chowdhery et al., PaLM, 2022)."""

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..model.detector import Detector

# Dense peaks of the tensor cores in TFLOP/s as the makers state them: bf16 or fp16, and tf32,
# which is what fp32 training can reach. By whole words of torch's name of the device, first match:
# an "RTX A1000" is no A100.
PEAK_TFLOPS = {
    "H200": (989, 495),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 418),
    "H100": (989, 495),
    "A100": (312, 156),
    "A10": (125, 62),
    "L40S": (362, 183),
    "L4": (121, 60),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "RTX 4090": (165, 83),
    "RTX 3090": (71, 36),
}
PASSES = 3  # a backward pass costs two forward passes


class Utilization:
    """Knows what a picture costs and what the device could do.

    Args:
        detector: on any device; it is counted once, and only where the peak is known.
        image_px: height and width of the frame.
        device: that trains.
        precision: what is computed in: "fp32", "bf16" or "fp16".
    """

    def __init__(
        self, detector: Detector, image_px: tuple[int, int], device: torch.device, precision: str
    ):
        self.peak_tflops = _peak_tflops(device, precision)
        self.gflops = gflops(detector, image_px) if self.peak_tflops else 0.0

    def share(self, images_per_s: float) -> float | None:
        """MFU at a speed of one device; None where its peak is not known, as a CPU's."""
        if self.peak_tflops is None:
            return None
        return round(images_per_s * PASSES * self.gflops / 1e3 / self.peak_tflops, 4)


def gflops(detector: Detector, image_px: tuple[int, int]) -> float:
    """Floating-point operations of a forward pass of one picture, in 10⁹; 2 a multiply-add."""
    first = next(detector.parameters())
    images = torch.zeros(1, 3, *image_px, device=first.device, dtype=first.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector(images)
    return counter.get_total_flops() / 1e9


def _peak_tflops(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "Laptop" in name:  # same name, smaller chip
        return None
    found = next((peaks for part, peaks in PEAK_TFLOPS.items() if _has(name, part)), None)
    return found[precision == "fp32"] if found else None


def _has(name: str, words: str) -> bool:
    return re.search(rf"\b{words}\b", name) is not None
