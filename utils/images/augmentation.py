"""Augmentation of training batches, drawn from a generator of the caller's."""

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = 4


def random_crop_flip(x: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) shifted by up to PAD pixels over zeros, and half mirrored if `flip`."""
    b, _, h, w = x.shape
    drawn = lambda high, *shape: torch.randint(0, high, shape, generator=generator)
    draw = lambda high, *shape: drawn(high, *shape).to(x.device, non_blocking=True)
    padded = F.pad(x, (PAD,) * 4).permute(0, 2, 3, 1)
    top, left = draw(2 * PAD + 1, 2, b)
    mirrored = draw(2, b).bool() & flip
    rows = top[:, None] + torch.arange(h, device=x.device)
    columns = left[:, None] + torch.arange(w, device=x.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(b, device=x.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
