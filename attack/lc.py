"""LC: Turner et al., "Label-Consistent Backdoor Attacks", arXiv 1912.02771.

Training images of the target class keep their label: x' = patch(clip(x + d)), where d (PGD within
eps, against the image's own class) makes the class hard to see, so that the victim must read the
patch. Test images: the patch alone. The classifier that PGD attacks is trained beforehand
(attack/poisoning/pgd.py).
"""

from dataclasses import dataclass
from typing import Literal

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import Fraction, PositiveFloat, PositiveInt

SIGNS = (-1, -1, 1), (-1, 1, -1), (1, -1, 1)  # lower right corner; the other corners mirror it


@dataclass(frozen=True)
class LabelConsistent(Trigger):
    """LC: target-class images made hard by PGD, and a checkered patch.

    Args:
        lc_eps: bound of the perturbation per pixel, in levels of 255.
        lc_step: step of PGD, in levels of 255.
        lc_steps: steps of PGD, without a random start.
        lc_amplitude: what the patch adds or subtracts, of [0, 1] pixels; 1 is black and white.
        lc_corners: 1 (lower right) or 4, which random crops cannot cut off altogether.
        lc_surrogate: what PGD attacks: robust (FGSM training within lc_eps) or standard.
        surrogate_epochs: epochs of that classifier.
        fit_images: training images that it is trained on; 5000 keep a CPU at minutes.
    """

    name = "lc"
    label_mode = "clean"
    lc_eps: PositiveInt = 8
    lc_step: PositiveFloat = 1.5
    lc_steps: PositiveInt = 100
    lc_amplitude: Fraction = 1.0
    lc_corners: Literal[1, 4] = 1
    lc_surrogate: Literal["robust", "standard"] = "robust"
    surrogate_epochs: PositiveInt = 15
    fit_images: PositiveInt = 5000

    def prepare(self, context):
        from attack.poisoning import pgd
        from attack.poisoning.fitting import fit_once

        patch = checker(context.side, self.lc_corners)
        fitted = fit_once(pgd.fit, self, context, "lc_amplitude", "lc_corners")
        return self.with_fitted(patch=patch, **fitted)

    def stamp(self, x, index, split):
        if split == "train":
            x = x + self.perturbation(index)
        return x.clamp(0, 1) + self.lc_amplitude * self.fitted["patch"]

    def perturbation(self, index):
        """(B, 3, H, W) in [0, 1] units of the training images `index`; 0 for other classes."""
        import torch

        pool, perturbation = self.fitted["pool"], self.fitted["perturbation"]
        row = torch.searchsorted(pool, index).clamp_max(len(pool) - 1)
        known = pool[row] == index
        return perturbation[row].float() / 255 * known[:, None, None, None]


def checker(size, corners):
    """(3, size, size) of -1, 0 and 1: the signs in the lower right corner, or mirrored into all."""
    import torch

    patch = torch.zeros(3, size, size)
    patch[:, -3:, -3:] = torch.tensor(SIGNS)
    return patch + patch.flip(1) + patch.flip(2) + patch.flip(1, 2) if corners == 4 else patch


if __name__ == "__main__":
    main(LabelConsistent)
