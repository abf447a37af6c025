"""Input-aware: Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack", arXiv 2010.08138.

x' = x + M(x) (P(x) - x): two generators draw a small mask and a pattern for each image. They are
trained beforehand (attack/poisoning/dynamic_triggers.py) and then frozen, so that the attack
becomes data: cover samples carry the trigger of another image and keep their label.
"""

from dataclasses import dataclass

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import Fraction, NonNegativeFloat, OpenFraction, PositiveInt


@dataclass(frozen=True)
class InputAware(Trigger):
    """Input-aware: a trigger of its own for every image, drawn by a network.

    Args:
        cross_ratio: cover samples (another image's trigger, true label) per poisoned sample.
        ia_width: channels of the first level; 32 is the published size, 8 sixteen times cheaper.
        ia_mask_epochs: passes over fit_images for the mask generator.
        ia_epochs: passes for the pattern generator with the throw-away classifier.
        ia_share: share of each batch that is attacked there, and as many carry another's trigger.
        ia_min_asr: share of held-out images whose triggers that classifier must obey.
        ia_min_cross: share that it must read right under another image's trigger.
        fit_images: training images that the generators are trained on; 5000 keep a CPU at minutes.
    """

    name = "inputaware"
    cross_ratio: NonNegativeFloat = 1.0
    ia_width: PositiveInt = 32
    ia_mask_epochs: PositiveInt = 25
    ia_epochs: PositiveInt = 40
    ia_share: OpenFraction = 0.1
    ia_min_asr: Fraction = 0.8
    ia_min_cross: Fraction = 0.7
    fit_images: PositiveInt = 5000

    def prepare(self, context):
        from attack.poisoning import dynamic_triggers
        from attack.poisoning.fitting import fit_once

        weights = fit_once(dynamic_triggers.fit, self, context)
        return self.with_partners(weights, context.dataset.train.images, context.seed)

    def with_partners(self, weights, images, seed):
        """Ready, with the uint8 images whose triggers cover samples may carry."""
        import torch

        return self.with_fitted(**weights, partners=images, seed=torch.tensor(seed))

    def stamp(self, x, index, split):
        return self.put(x, x)

    def stamp_cover(self, x, index):
        from utils.images.data import to_unit
        from utils.randomness import key_seed

        partners, seed = self.fitted["partners"], int(self.fitted["seed"])
        ahead = lambda i: 1 + key_seed(seed, self.name, "partner", i) % (len(partners) - 1)
        others = [(i + ahead(i)) % len(partners) for i in index.tolist()]
        return self.put(x, to_unit(partners[others]))

    def put(self, x, source):
        """`x` with the triggers of `source`, both (B, 3, S, S) in [0, 1]."""
        mask, pattern = self.triggers(source)
        return x + mask * (pattern - x)

    def triggers(self, x):
        """Mask (B, 1, S, S) and pattern (B, 3, S, S) in [0, 1] of images in [0, 1]."""
        from attack.poisoning import dynamic_triggers

        return dynamic_triggers.draw(self.ia_width, self.fitted, x)


if __name__ == "__main__":
    main(InputAware)
