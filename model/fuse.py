"""Folding for inference: each BatchNorm into the convolution before it."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .detector import Detector
from .layers import Conv


@torch.no_grad()
def fuse(detector: Detector) -> Detector:
    """A copy in evaluation mode without the BatchNorms of neck, head and CSPDarknet.

    Its maps are the same up to rounding. GroupNorm and LayerNorm depend on the picture and stay;
    so do the norms of timm's trunks.
    """
    fused = copy.deepcopy(detector).eval()
    for module in fused.modules():
        if isinstance(module, Conv) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return fused
