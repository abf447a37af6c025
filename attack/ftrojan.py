"""FTrojan: Wang et al., "An Invisible Black-Box Backdoor Attack through Frequency Domain",
ECCV 2022, arXiv 2111.10991.

x' = C^-1 D^-1 (D C x + m at some bins of some channels), with C: RGB -> YCrCb and D: the
orthonormal DCT-II of the whole image. C and D are linear, so that in floats
x' = x + C^-1 D^-1 (m at those bins): one fixed pattern.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import PositiveFloat, UserError

# columns: what Y, Cr and Cb (ITU-R BT.601) add to R, G and B
TO_RGB = (1, 1.402, 0), (1, -0.714136, -0.344136), (1, 0, 1.772)


@dataclass(frozen=True)
class FTrojan(Trigger):
    """FTrojan: two frequencies of the chroma.

    Args:
        pos_list: pairs [row, column] of DCT bins, for example [[15,15],[31,31]]; a pair given twice
            counts twice.
        channel_list: 0 Y, 1 Cr, 2 Cb.
        magnitude: what is added to each bin, in levels of 255.
    """

    name = "ftrojan"
    pos_list: list = field(default_factory=lambda: [[15, 15], [31, 31]])
    channel_list: list = field(default_factory=lambda: [1, 2])
    magnitude: PositiveFloat = 30.0

    def __post_init__(self):
        is_pair = lambda pair: isinstance(pair, list) and len(pair) == 2 and _natural(pair)
        if not self.pos_list or not all(map(is_pair, self.pos_list)):
            raise UserError(
                f"pos_list: {self.pos_list} is no list of pairs [row, column]; "
                "write for example [[15,15],[31,31]]"
            )
        if not self.channel_list or not _natural(self.channel_list, end=3):
            given = self.channel_list
            raise UserError(f"channel_list: {given} is no list of 0 (Y), 1 (Cr) and 2 (Cb)")

    def prepare(self, context):
        import torch

        size = context.side
        if max(map(max, self.pos_list)) >= size:
            outside = f"is outside the bins 0..{size - 1} of {size}x{size} images"
            raise UserError(f"pos_list: {self.pos_list} {outside}")
        waves = sum(torch.outer(cosine(v, size), cosine(u, size)) for v, u in self.pos_list)
        channels = torch.tensor(TO_RGB, dtype=torch.float64)[:, self.channel_list].sum(1)
        pattern = self.magnitude / 255 * channels[:, None, None] * waves
        return self.with_fitted(pattern=pattern.float())

    def stamp(self, x, index, split):
        return x + self.fitted["pattern"]


def _natural(values: list[Any], end: float = math.inf) -> bool:
    return all(type(value) is int and 0 <= value < end for value in values)


def cosine(k, n):
    """float64 (n,): row k of the orthonormal DCT-II of length n."""
    import torch

    angles = math.pi * k * (2 * torch.arange(n, dtype=torch.float64) + 1) / (2 * n)
    return math.sqrt((2 if k else 1) / n) * torch.cos(angles)


if __name__ == "__main__":
    main(FTrojan)
