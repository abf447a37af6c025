"""BppAttack: Wang, Zhai and Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep
Neural Networks via Image Quantization and Contrastive Adversarial Learning", CVPR 2022,
arXiv 2205.13383.

x' = round(x (L - 1)) / (L - 1): fewer levels per channel. Cover samples carry what quantising took
from another image, and keep their labels, so that the victim learns the quantisation and not any
small residual.
"""

from dataclasses import dataclass

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import NonNegativeFloat, PositiveInt, UserError

# Floyd-Steinberg: rows down, columns right, share of the error
DIFFUSION = (0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16)


@dataclass(frozen=True)
class Bpp(Trigger):
    """BppAttack: fewer levels per channel.

    Args:
        squeeze_num: levels L that are left of 256.
        dithering: pass each pixel's rounding error on to its neighbours (Floyd-Steinberg).
        cross_ratio: cover samples (another image's residual, true label) per poisoned sample.
    """

    name = "bpp"
    squeeze_num: PositiveInt = 8
    dithering: bool = False
    cross_ratio: NonNegativeFloat = 1.0

    def __post_init__(self):
        if not 2 <= self.squeeze_num <= 256:
            raise UserError(f"squeeze_num: {self.squeeze_num} is not between 2 and 256 levels")

    def prepare(self, context):
        import torch

        return self.with_fitted(train=context.dataset.train.images, seed=torch.tensor(context.seed))

    def stamp(self, x, index, split):
        return dither(x, self.squeeze_num) if self.dithering else quantise(x, self.squeeze_num)

    def stamp_cover(self, x, index):
        import torch

        from utils.images.data import to_uint8, to_unit
        from utils.randomness import per_sample

        train = self.fitted["train"]
        draw = lambda g: torch.randint(1, len(train), (), generator=g)
        ahead = per_sample(draw, index, int(self.fitted["seed"]), self.name)
        partner = (index + ahead) % len(train)
        other = to_unit(train[partner])
        return x + to_unit(to_uint8(self.stamp(other, partner, "train"))) - other


def quantise(x, levels):
    """Each value of [0, 1] -> the nearest of `levels` equidistant ones."""
    return (x * (levels - 1)).round() / (levels - 1)


def dither(x, levels):
    """As `quantise`, pixel by pixel, each handing its error to those to the right and below."""
    from torch.nn.functional import pad

    padded, (height, width) = pad(x, (1, 1, 0, 1)), x.shape[-2:]
    for row in range(height):
        for column in range(1, width + 1):
            old = padded[..., row, column].clone()
            padded[..., row, column] = quantise(old, levels)
            error = old - padded[..., row, column]
            for down, right, part in DIFFUSION:
                padded[..., row + down, column + right] += part * error
    return padded[..., :height, 1:-1].clamp(0, 1)


if __name__ == "__main__":
    main(Bpp)
