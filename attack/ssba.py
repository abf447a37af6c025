"""SSBA (ISSBA): Li et al., "Invisible Backdoor Attack with Sample-Specific Triggers",
arXiv 2012.03816.

x' = x + E(x, s): an encoder E hides one fixed string of bits s in every poisoned image, as a
residual that depends on the image. E is trained beforehand, with a decoder that reads the bits
(attack/poisoning/hidden_bits.py).
"""

from dataclasses import dataclass

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import Fraction, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class SampleSpecific(Trigger):
    """SSBA: the same hidden bits in every poisoned image, by a residual of its own for each.

    Args:
        ssba_bits: length of the hidden string, which the seed draws.
        ssba_limit: bound of the residual per pixel, of [0, 1].
        ssba_width: channels of the first level; 32 is the published size, 16 four times cheaper.
        ssba_epochs: passes over fit_images.
        ssba_warmup: how many of them train for the bits alone.
        ssba_lr: learning rate of Adam.
        ssba_psnr: quality in dB that the training steers to; refused if more than 2 dB below.
        fit_images: training images for both networks; 5000 keep a CPU at minutes.
    """

    name = "ssba"
    ssba_bits: PositiveInt = 20
    ssba_limit: Fraction = 0.12
    ssba_width: PositiveInt = 32
    ssba_epochs: PositiveInt = 20
    ssba_warmup: PositiveInt = 2
    ssba_lr: PositiveFloat = 2e-3
    ssba_psnr: PositiveFloat = 30.0
    fit_images: PositiveInt = 5000

    def prepare(self, context):
        from attack.poisoning import hidden_bits
        from attack.poisoning.fitting import fit_once

        return self.with_fitted(**fit_once(hidden_bits.fit, self, context, "target"))

    def stamp(self, x, index, split):
        return x + self.residual(x)

    def residual(self, x):
        """What the encoder adds to images (B, 3, S, S) in [0, 1], to hide the secret."""
        from attack.poisoning import hidden_bits

        return hidden_bits.residual(self, x)

    def read(self, images):
        """The bits (N, L), 0 or 1, that the decoder finds in uint8 images (N, 3, S, S)."""
        from attack.poisoning import hidden_bits

        return hidden_bits.read(self, images)


if __name__ == "__main__":
    main(SampleSpecific)
