"""Adaptive-Blend: Qi et al., "Revisiting the Assumption of Latent Separability for Backdoor
Defenses", ICLR 2023.

x' = x + a m (T - x): the picture of Blended in 4 x 4 pieces, of which a random half is missing in
each training image and none at test. As many cover samples carry the same trigger with their true
label, so that poisoned samples do not stand apart in feature space.
"""

from dataclasses import dataclass

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import Fraction, NonNegativeFloat

GRID = 4  # pieces per side


@dataclass(frozen=True)
class AdaptiveBlend(Trigger):
    """Adaptive-Blend: half of the pieces of a picture, and cover samples.

    Args:
        attack_trigger_img_path: cartoon, leaves, clouds, grain, hills, noise (all drawn by
            the program), or an image file.
        alpha_train: share of the picture in poisoned and in cover training images.
        alpha_test: share of the picture in triggered test images.
        cross_ratio: cover samples per poisoned sample.
    """

    name = "adaptive_blend"
    attack_trigger_img_path: str = "cartoon"
    alpha_train: Fraction = 0.15
    alpha_test: Fraction = 0.2
    cross_ratio: NonNegativeFloat = 1.0

    def prepare(self, context):
        import torch

        from attack.poisoning.picture import load_picture

        picture = load_picture(self.attack_trigger_img_path, context.side)
        return self.with_fitted(picture=picture, seed=torch.tensor(context.seed))

    def stamp(self, x, index, split):
        if split == "test":
            return x + self.alpha_test * (self.fitted["picture"] - x)
        laid = self.pieces(index, x.shape[-1])
        return x + self.alpha_train * laid * (self.fitted["picture"] - x)

    def pieces(self, index, size):
        """bool (B, 1, size, size): where each training image is covered, 8 of the 16 pieces."""
        import torch

        from utils.randomness import per_sample

        half = lambda g: torch.randperm(GRID**2, generator=g) < GRID**2 // 2
        kept = per_sample(half, index, int(self.fitted["seed"]), self.name)
        piece_of = torch.arange(size) * GRID // size
        return kept.view(-1, 1, GRID, GRID)[:, :, piece_of][..., piece_of]


if __name__ == "__main__":
    main(AdaptiveBlend)
