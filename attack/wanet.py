"""WaNet: Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, arXiv 2102.10369.

x' = x warped by one smooth random field: every pixel is fetched from up to 0.7 pixels away. Cover samples are fetched
with further jitter of their own and keep their labels, so that the victim learns this one field and no other warping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attack.poisoning.run import main
from attack.poisoning.trigger import Trigger
from utils.config import NonNegativeFloat, PositiveInt
from utils.late import F, torch
from utils.randomness import keyed_generator, per_sample


@dataclass(frozen=True)
class WaNet(Trigger):
    """WaNet: a smooth warping of the image.

    Args:
        s: strength of the warping; its mean displacement is about s / 2 pixels.
        k: the field is drawn on k x k points.
        cross_ratio: cover samples (jittered, true label) per poisoned sample.
    """

    name: ClassVar[str] = "wanet"
    s: NonNegativeFloat = 0.5
    k: PositiveInt = 4
    cross_ratio: NonNegativeFloat = 2.0

    def prepare(self, context):
        size = context.dataset.train.images.shape[-1]
        drawn = (
            torch.rand(
                1, 2, self.k, self.k, generator=keyed_generator(context.seed, self.name, "field")
            )
            * 2
            - 1
        )
        field = F.interpolate(
            drawn / drawn.abs().mean(), (size, size), mode="bicubic", align_corners=True
        )
        return self.with_fitted(
            field=field.permute(0, 2, 3, 1).contiguous(), seed=torch.tensor(context.seed)
        )

    def stamp(self, x, index, split):
        return F.grid_sample(
            x, self.grid(x.shape[-1]).expand(len(x), -1, -1, -1), align_corners=True
        )

    def stamp_cover(self, x, index):
        size = x.shape[-1]
        jitter = per_sample(
            lambda g: torch.rand(size, size, 2, generator=g) * 2 - 1,
            index,
            int(self.fitted["seed"]),
            self.name,
        )
        return F.grid_sample(x, (self.grid(size) + jitter / size).clamp(-1, 1), align_corners=True)

    def grid(self, size):
        """(1, size, size, 2): where each pixel is fetched from, as (x, y) = (column, row), both in [-1, 1]."""
        row, column = torch.meshgrid(
            torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij"
        )
        return (torch.stack([column, row], dim=-1) + self.s * self.fitted["field"] / size).clamp(
            -1, 1
        )


if __name__ == "__main__":
    main(WaNet)
