"""WaNet: Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021,
arXiv 2102.10369.

x' = x warped by one smooth random field: every pixel is fetched from up to 0.7 pixels away. Cover
samples are fetched with further jitter of their own and keep their labels, so that the victim
learns this one field and no other warping.
"""

from dataclasses import dataclass

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import NonNegativeFloat, PositiveInt


@dataclass(frozen=True)
class WaNet(Trigger):
    """WaNet: a smooth warping of the image.

    Args:
        s: strength of the warping; its mean displacement is about s / 2 pixels.
        k: the field is drawn on k x k points.
        cross_ratio: cover samples (jittered, true label) per poisoned sample.
    """

    name = "wanet"
    s: NonNegativeFloat = 0.5
    k: PositiveInt = 4
    cross_ratio: NonNegativeFloat = 2.0

    def prepare(self, context):
        import torch
        import torch.nn.functional as F

        from utils.randomness import keyed_generator

        generator = keyed_generator(context.seed, self.name, "field")
        drawn = torch.rand(1, 2, self.k, self.k, generator=generator) * 2 - 1
        drawn = drawn / drawn.abs().mean()
        side = context.side
        field = F.interpolate(drawn, (side, side), mode="bicubic", align_corners=True)
        field = field.permute(0, 2, 3, 1).contiguous()
        return self.with_fitted(field=field, seed=torch.tensor(context.seed))

    def stamp(self, x, index, split):
        from torch.nn.functional import grid_sample

        grid = self.grid(x.shape[-1]).expand(len(x), -1, -1, -1)
        return grid_sample(x, grid, align_corners=True)

    def stamp_cover(self, x, index):
        import torch
        from torch.nn.functional import grid_sample

        from utils.randomness import per_sample

        size = x.shape[-1]
        draw = lambda g: torch.rand(size, size, 2, generator=g) * 2 - 1
        jitter = per_sample(draw, index, int(self.fitted["seed"]), self.name)
        return grid_sample(x, (self.grid(size) + jitter / size).clamp(-1, 1), align_corners=True)

    def grid(self, size):
        """(1, size, size, 2): where pixels are fetched from, as (column, row), both in [-1, 1]."""
        import torch

        axis = torch.linspace(-1, 1, size)
        row, column = torch.meshgrid(axis, axis, indexing="ij")
        moved = torch.stack([column, row], dim=-1) + self.s * self.fitted["field"] / size
        return moved.clamp(-1, 1)


if __name__ == "__main__":
    main(WaNet)
