"""The anchor head of YOLOv5: one 1×1 convolution a level, and its decoding."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


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


def cell_grid(height: int, width: int, device: torch.device) -> Tensor:
    """x and y index of each cell, `[H, W, 2]`."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack((x, y), dim=-1)
