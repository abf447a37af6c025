"""FTrojan: Wang et al., "An Invisible Black-Box Backdoor Attack through Frequency Domain", ECCV 2022, arXiv 2111.10991.

x' = C^-1 D^-1 (D C x + m at some bins of some channels), with C: RGB -> YCrCb and D: the orthonormal DCT-II of the
whole image. C and D are linear, so that in floats x' = x + C^-1 D^-1 (m at those bins): one fixed pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from attack.poisoning.run import main
from attack.poisoning.trigger import Trigger
from utils.config import PositiveFloat, UserError
from utils.late import torch

# columns: what Y, Cr and Cb (ITU-R BT.601) add to R, G and B
TO_RGB = (1, 1.402, 0), (1, -0.714136, -0.344136), (1, 0, 1.772)


@dataclass(frozen=True)
class FTrojan(Trigger):
    """FTrojan: two frequencies of the chroma.

    Args:
        pos_list: pairs [row, column] of DCT bins, for example [[15,15],[31,31]]; a pair given twice counts twice.
        channel_list: 0 Y, 1 Cr, 2 Cb.
        magnitude: what is added to each bin, in levels of 255.
    """

    name: ClassVar[str] = "ftrojan"
    pos_list: list = field(default_factory=lambda: [[15, 15], [31, 31]])
    channel_list: list = field(default_factory=lambda: [1, 2])
    magnitude: PositiveFloat = 30.0

    def __post_init__(self):
        if not self.pos_list or not all(
            isinstance(pair, list) and len(pair) == 2 and _natural(pair) for pair in self.pos_list
        ):
            raise UserError(
                f"pos_list: {self.pos_list} is no list of pairs [row, column]; write for example [[15,15],[31,31]]"
            )
        if not self.channel_list or not _natural(self.channel_list, end=3):
            raise UserError(
                f"channel_list: {self.channel_list} is no list of 0 (Y), 1 (Cr) and 2 (Cb)"
            )

    def prepare(self, context):
        size = context.dataset.train.images.shape[-1]
        if max(map(max, self.pos_list)) >= size:
            raise UserError(
                f"pos_list: {self.pos_list} is outside the bins 0..{size - 1} of {size}x{size} images"
            )
        waves = sum(
            torch.outer(cosine(row, size), cosine(column, size)) for row, column in self.pos_list
        )
        channels = torch.tensor(TO_RGB, dtype=torch.float64)[:, self.channel_list].sum(1)
        return self.with_fitted(
            pattern=(self.magnitude / 255 * channels[:, None, None] * waves).float()
        )

    def stamp(self, x, index, split):
        return x + self.fitted["pattern"]


def _natural(values: list[Any], end: float = math.inf) -> bool:
    return all(type(value) is int and 0 <= value < end for value in values)


def cosine(k: int, n: int) -> torch.Tensor:
    """Row k (n,) of the orthonormal DCT-II of length n."""
    return math.sqrt((2 if k else 1) / n) * torch.cos(
        math.pi * k * (2 * torch.arange(n, dtype=torch.float64) + 1) / (2 * n)
    )


if __name__ == "__main__":
    main(FTrojan)
