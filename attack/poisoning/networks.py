"""Networks that attacks train: SSBA's encoder and decoder (Li et al., arXiv 2012.03816), and Input-aware's generators (Nguyen & Tran,
arXiv 2010.08138).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """A U-Net on the image and a picture of the bits: x (B, 3, S, S) in [0, 1], bits (B, L) of 0 and 1 -> residual within +-limit."""

    def __init__(self, side: int, bits: int, width: int, limit: float):
        super().__init__()
        self.limit, sizes = limit, [width, width, 2 * width, 4 * width, 8 * width]
        self.picture = nn.Linear(bits, 3 * side * side)
        self.down = nn.ModuleList(
            nn.Conv2d(i, o, 3, 1 if level == 0 else 2, 1)
            for level, (i, o) in enumerate(zip([6, *sizes], sizes))
        )
        self.up = nn.ModuleList(
            nn.Conv2d(i, o, 3, 1, 1) for i, o in zip(sizes[:0:-1], sizes[-2::-1])
        )
        self.join = nn.ModuleList(nn.Conv2d(2 * o, o, 3, 1, 1) for o in sizes[-2::-1])
        self.last = nn.Conv2d(width + 6, 3, 3, 1, 1)

    def forward(self, x: Tensor, bits: Tensor) -> Tensor:
        start = torch.cat([x - 0.5, self.picture(2 * bits - 1).view_as(x)], 1)
        levels = [start]
        for conv in self.down:
            levels.append(F.relu(conv(levels[-1])))
        out = levels.pop()
        for up, join, skip in zip(self.up, self.join, levels[:0:-1]):
            out = F.relu(up(F.interpolate(out, size=skip.shape[-2:])))
            out = F.relu(join(torch.cat([out, skip], 1)))
        return self.limit * torch.tanh(self.last(torch.cat([out, start], 1)))


class Decoder(nn.Module):
    """Seven convolutions down to a few pixels, and two dense layers: [0, 1] (B, 3, S, S) -> logits of the bits (B, L)."""

    def __init__(self, side: int, bits: int, width: int):
        super().__init__()
        sizes, strides = (
            [width, width, 2 * width, 2 * width, 2 * width, 4 * width, 4 * width],
            [2, 1, 2, 1, 2, 2, 2],
        )
        convs = [
            layer
            for i, o, stride in zip([3, *sizes], sizes, strides)
            for layer in (nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())
        ]
        self.body = nn.Sequential(
            *convs,
            nn.Flatten(),
            nn.Linear(sizes[-1] * (-(-side // 32)) ** 2, 512),
            nn.ReLU(),
            nn.Linear(512, bits),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - 0.5)


def convolutions(*widths: int) -> list[nn.Module]:
    return [
        layer
        for i, o in itertools.pairwise(widths)
        for layer in (nn.Conv2d(i, o, 3, 1, 1), nn.BatchNorm2d(o, momentum=0.05), nn.ReLU())
    ]


class Generator(nn.Module):
    """Three levels down, three up: [0, 1] images (B, 3, S, S) -> (B, channels, S, S) in [0, 1]; S a multiple of 8."""

    def __init__(
        self,
        channels: int,
        width: int,
        mean: Sequence[float] = (0, 0, 0),
        std: Sequence[float] = (1, 1, 1),
    ):
        super().__init__()
        w = width
        down = [
            layer
            for i, o in ((3, w), (w, 2 * w), (2 * w, 4 * w))
            for layer in (*convolutions(i, o, o), nn.MaxPool2d(2))
        ]
        up = [
            layer
            for i, o in ((4 * w, 4 * w), (4 * w, 2 * w), (2 * w, w))
            for layer in (nn.Upsample(scale_factor=2, mode="bilinear"), *convolutions(i, o, o))
        ]
        self.body = nn.Sequential(
            *down, *convolutions(4 * w, 4 * w), *up, nn.Conv2d(w, channels, 3, 1, 1)
        )
        self.register_buffer("mean", torch.tensor(mean).float().view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).float().view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body((x - self.mean) / self.std)) / 2 + 0.5


class MaskGenerator(Generator):
    """One channel, pushed towards 0 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(20 * super().forward(x) - 10) / 2 + 0.5
