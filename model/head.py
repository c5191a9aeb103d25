"""The two heads, and how what they say becomes boxes.

`AnchorHead` is YOLOv5's: anchors, objectness, one 1×1 convolution a level. `AlignedHead` is ours:
no anchors, no objectness, classes and boxes in branches of their own.
B batch, A anchors, H W cells of a level, M cells of all levels, C classes, R bins of a distance.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import Conv, SeparableConv
from .norms import group_norm


class AnchorHead(nn.Module):
    """Predicts, for A anchors at each cell, box offsets, objectness and C classes.

    Args:
        in_channels: channels of the three feature maps.
        classes: number of classes, C.
        anchors: for each level, A pairs of width and height in pixels.
        strides: pixels a cell, level by level.
    """

    anchors: Tensor

    def __init__(
        self,
        in_channels: Sequence[int],
        classes: int,
        anchors: Sequence[Sequence[Sequence[float]]],
        strides: Sequence[int],
    ):
        super().__init__()
        self.classes, self.strides = classes, tuple(strides)
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32))  # [L, A, 2] px
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, len(anchors[0]) * (5 + classes), 1) for channels in in_channels
        )
        self._init_biases()

    @torch.no_grad()
    def _init_biases(self) -> None:
        """Starts objectness at about 8 objects a 640 px image, classes at .6 / C."""
        for conv, stride in zip(self.convs, self.strides, strict=True):
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            bias = conv.bias.view(self.anchors.shape[1], -1)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.classes - 0.99999))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps `[B, channels, H, W]` → raw maps `[B, A, H, W, 5 + C]`, logits."""
        raw = []
        for conv, feature in zip(self.convs, features, strict=True):
            x = conv(feature)
            batch, _, height, width = x.shape
            x = x.view(batch, self.anchors.shape[1], 5 + self.classes, height, width)
            raw.append(x.permute(0, 1, 3, 4, 2))
        return raw

    def decode(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Raw maps → boxes xyxy in input pixels `[B, M, 4]` and class scores `[B, M, C]`.

        Centre = (2σ - .5 + cell)·stride, size = (2σ)²·anchor, score = objectness · class: the
        published decoding of YOLOv5, which reaches half a cell over each border of the cell.
        """
        boxes, scores = [], []
        for level, stride, anchors in zip(raw, self.strides, self.anchors, strict=True):
            batch, _, height, width, _ = level.shape
            probability = level.float().sigmoid()
            cells = cell_grid(height, width, level.device)
            centre = (probability[..., :2] * 2 - 0.5 + cells) * stride
            half = (probability[..., 2:4] * 2).square() * anchors[None, :, None, None] / 2
            boxes.append(torch.cat((centre - half, centre + half), -1).view(batch, -1, 4))
            score = probability[..., 4:5] * probability[..., 5:]
            scores.append(score.reshape(batch, -1, self.classes))
        return torch.cat(boxes, 1), torch.cat(scores, 1)


class AlignedHead(nn.Module):
    """Predicts, for each cell, C classes and four distances to the sides of a box.

    The distances are distributions over R bins of a stride each (Li et al., "Generalized Focal
    Loss", 2020). The branches are decoupled (Ge et al., YOLOX, 2021), shared by the levels (Tian
    et al., FCOS, 2019; Lyu et al., RTMDet, 2022) and made of separable 5×5 convolutions, whose
    cost is that of 1×1 ones; the last 1×1 of each level is its own.

    Args:
        in_channels: channels of the three feature maps.
        classes: number of classes, C.
        width: channels of the branches.
        depth: convolutions of each branch.
        bins: R; a box reaches at most R - 1 strides from the centre of its cell.
        strides: pixels a cell, level by level.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        classes: int,
        width: int,
        depth: int,
        bins: int,
        strides: Sequence[int],
    ):
        super().__init__()
        self.classes, self.bins, self.strides = classes, bins, tuple(strides)
        self.stems = nn.ModuleList(Conv(c, width, norm=group_norm) for c in in_channels)
        self.box_branch = nn.Sequential(
            *(SeparableConv(width, 5, group_norm) for _ in range(depth))
        )
        self.cls_branch = nn.Sequential(
            *(SeparableConv(width, 5, group_norm) for _ in range(depth))
        )
        self.box_convs = nn.ModuleList(nn.Conv2d(width, 4 * bins, 1) for _ in strides)
        self.cls_convs = nn.ModuleList(nn.Conv2d(width, classes, 1) for _ in strides)
        self._init_last()

    @torch.no_grad()
    def _init_last(self) -> None:
        """Starts with a class prior of 1 % and boxes three strides wide, whatever the picture.

        The prior is that of Lin et al., "Focal Loss", 2017, section 4.1. Distances that start
        uniform give boxes 15 strides wide. Small objects then overlap none of them, get a quality
        near zero, and a rare small class is never learnt.
        """
        # Probabilities falling as e^(-bin / 2) have a mean of 1.5 bins.
        for convs, bias in (
            (self.box_convs, (torch.arange(self.bins) / -2).repeat(4)),
            (self.cls_convs, torch.full((self.classes,), -math.log(99))),
        ):
            for conv in convs:
                assert isinstance(conv, nn.Conv2d) and conv.bias is not None
                nn.init.normal_(conv.weight, std=0.01)
                conv.bias.copy_(bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps `[B, channels, H, W]` → raw maps `[B, H, W, 4·R + C]`, logits."""
        raw = []
        for level, feature in enumerate(features):
            x = self.stems[level](feature)
            box = self.box_convs[level](self.box_branch(x))
            cls = self.cls_convs[level](self.cls_branch(x))
            raw.append(torch.cat((box, cls), dim=1).permute(0, 2, 3, 1))
        return raw

    def decode(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Raw maps → boxes xyxy in input pixels `[B, M, 4]` and class scores `[B, M, C]`."""
        distances, logits = self.split(raw)
        return self.boxes(distances, *self.cells(raw)), logits.sigmoid()

    def split(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Raw maps → logits of distances `[B, M, 4, R]` and of classes `[B, M, C]`, 32 bits."""
        flat = torch.cat([level.flatten(1, 2) for level in raw], dim=1).float()
        distances, logits = flat.split((4 * self.bins, self.classes), dim=-1)
        return distances.unflatten(-1, (4, self.bins)), logits

    def cells(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Centres of all cells in input pixels `[M, 2]`, and their strides `[M, 1]`."""
        centres, strides = [], []
        for level, stride in zip(raw, self.strides, strict=True):
            grid = cell_grid(level.shape[1], level.shape[2], level.device).flatten(0, 1)
            centres.append((grid + 0.5) * stride)
            strides.append(torch.full_like(centres[-1][:, :1], stride))
        return torch.cat(centres), torch.cat(strides)

    def boxes(self, distances: Tensor, centres: Tensor, strides: Tensor) -> Tensor:
        """The means of the distributions `[B, M, 4, R]` as boxes xyxy in pixels `[B, M, 4]`."""
        bins = torch.arange(self.bins, dtype=distances.dtype, device=distances.device)
        left_top, right_bottom = ((distances.softmax(-1) @ bins) * strides).chunk(2, dim=-1)
        return torch.cat((centres - left_top, centres + right_bottom), dim=-1)


def cell_grid(height: int, width: int, device: torch.device) -> Tensor:
    """x and y index of each cell, `[H, W, 2]`."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack((x, y), dim=-1)
