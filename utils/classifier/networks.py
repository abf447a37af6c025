# He et al., Identity mappings in deep residual networks, 2016: https://arxiv.org/abs/1603.05027
"""Networks that classify: [0, 1] images (B, 3, H, W) -> logits (B, C); the first layer normalises.

PreActResNets have the 3x3 stem that is used for 32x32 images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from utils.images.data import DatasetInfo


class Classifier(nn.Module):
    """A body that gives pooled features, and a linear head, on normalised images.

    Args:
        body: (B, 3, H, W) normalised -> (B, D).
        width: D.
        num_classes: C.
        info: the data set's entry; its mean and std become the first layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, width: int, num_classes: int, info: DatasetInfo):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, num_classes)
        self.register_buffer("mean", torch.tensor(info.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(1, 3, 1, 1))

    def features(self, x: Tensor) -> Tensor:
        """[0, 1] (B, 3, H, W) -> pooled features of the last layer (B, D)."""
        return self.body((x - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        """[0, 1] (B, 3, H, W) -> logits (B, C)."""
        return self.head(self.features(x))

    @property
    def device(self) -> torch.device:
        return self.mean.device


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice, added to the input (or to its 1x1 projection where the shape changes)."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(in_width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = stride == 1 and in_width == width
        self.shortcut = None if same else nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x).relu_()
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(self.bn2(out).relu_()) + skip


def preactresnet(widths: Sequence[int], blocks: int, final_norm: bool) -> tuple[nn.Module, int]:
    """A body of `blocks` blocks at each width, halving the resolution from the second width on."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)]
    previous = widths[0]
    for level, width in enumerate(widths):
        for block in range(blocks):
            layers.append(PreActBlock(previous, width, 2 if level > 0 and block == 0 else 1))
            previous = width
    if final_norm:
        layers += [nn.BatchNorm2d(previous), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), previous


MODELS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    # as published: no norm after the last block, 512 features
    "preactresnet18": lambda: preactresnet((64, 128, 256, 512), 2, final_norm=False),
    # for CPUs: 0.4 M parameters
    "preactresnet_small": lambda: preactresnet((16, 32, 64, 128), 1, final_norm=True),
}
