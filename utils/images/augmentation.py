"""Augmentation of training batches, drawn from a generator of the caller's."""

from __future__ import annotations

from utils.late import F, Tensor, torch

PAD = 4


def random_crop_flip(x: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) shifted by up to PAD pixels over zeros, and mirrored with p = 1/2 if `flip`."""
    b, _, h, w = x.shape
    padded = F.pad(x, (PAD,) * 4)
    top, left = torch.randint(0, 2 * PAD + 1, (2, b), generator=generator).to(
        x.device, non_blocking=True
    )
    mirrored = (
        torch.randint(0, 2, (b,), generator=generator).to(x.device, non_blocking=True).bool() & flip
    )
    rows = top[:, None] + torch.arange(h, device=x.device)
    columns = left[:, None] + torch.arange(w, device=x.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
