"""Folding BatchNorm: the same maps. The parameters are counted in test_parameter_counts.py."""

import torch
from torch import nn

from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.fuse import fuse


def test_the_maps_are_the_same(architecture):
    torch.manual_seed(0)
    detector = build_detector(architecture).eval()
    for norm in detector.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
                tensor.normal_()
            norm.running_var.uniform_(0.5, 2)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        before, after = detector(images).levels, fuse(detector)(images).levels
        again = detector(images).levels
    for a, b, c in zip(before, after, again, strict=True):
        assert torch.equal(a, c)  # the detector itself is as it was
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
