"""LC: Turner et al., "Label-Consistent Backdoor Attacks", arXiv 1912.02771.

Training images of the target class keep their label: x' = patch(clip(x + d)), where d (PGD within
eps, against the image's own class) makes the class hard to see, so that the victim must read the
patch. Test images: the patch alone. The classifier that PGD attacks is trained beforehand
(attack/poisoning/pgd.py).

Not in the paper: another class's image mixed in instead of d (lc_mix), and cover samples, which
carry another's d, or an image of the target class mixed in, and no patch, under their own label.
Where d leaves the class readable, as a small classifier may find it, no patch is learned.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, UserError

# on what is fitted
NO_INFLUENCE = ("lc_amplitude", "lc_corners", "lc_cell", "lc_mix", "cross_ratio")
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
        lc_cell: side in pixels of a square of the patch, which has three by three of them.
        lc_mix: share of another class's image that is mixed into poisoned ones instead of PGD; 0 is
            PGD. Interpolation, as in the paper's section 4, but of pixels and not in a GAN.
        cross_ratio: cover samples (true label, no patch) per poisoned sample; another's perturbation
            or, with lc_mix, that share of an image of the target class is in them.
        lc_surrogate: what PGD attacks: robust (FGSM training within lc_eps) or standard.
        surrogate_epochs: epochs of that classifier.
        fit_images: training images that it is trained on; 5000 keep a CPU at minutes.
    """

    LATER_KEYS: ClassVar[dict[str, Any]] = {"lc_cell": 1, "lc_mix": 0.0, "cross_ratio": 0.0}

    name = "lc"
    label_mode = "clean"
    lc_eps: PositiveInt = 8
    lc_step: PositiveFloat = 1.5
    lc_steps: PositiveInt = 100
    lc_amplitude: Fraction = 1.0
    lc_corners: Literal[1, 4] = 1
    lc_cell: PositiveInt = 1
    lc_mix: Fraction = 0.0
    cross_ratio: NonNegativeFloat = 0.0
    lc_surrogate: Literal["robust", "standard"] = "robust"
    surrogate_epochs: PositiveInt = 15
    fit_images: PositiveInt = 5000

    @property
    def images_fitted_on(self):
        return 0 if self.lc_mix else self.fit_images

    def prepare(self, context):
        import torch

        from attack.poisoning import pgd
        from attack.poisoning.fitting import fit_once

        ready = {"patch": checker(context.side, self.lc_corners, self.lc_cell)}
        ready["seed"] = torch.tensor(context.seed)
        if self.lc_mix:
            train = context.dataset.train
            ours = train.labels == context.target
            ready |= {"ours": train.images[ours], "others": train.images[~ours]}
            return self.with_fitted(**ready)
        return self.with_fitted(**ready, **fit_once(pgd.fit, self, context, *NO_INFLUENCE))

    def stamp(self, x, index, split):
        if split == "train":
            x = self.mixed(x, index, "others") if self.lc_mix else x + self.perturbation(index)
        return x.clamp(0, 1) + self.lc_amplitude * self.fitted["patch"]

    def stamp_cover(self, x, index):
        if self.lc_mix:
            return self.mixed(x, index, "ours")
        return x + self.drawn(index, "perturbation").float() / 255

    def mixed(self, x, index, partners):
        """`x` with lc_mix of an image in it that is drawn for each."""
        return x + self.lc_mix * (self.drawn(index, partners).float() / 255 - x)

    def drawn(self, index, kind):
        """(B, 3, H, W): for each image one of `self.fitted[kind]`."""
        from utils.randomness import key_seed

        those, seed = self.fitted[kind], int(self.fitted["seed"])
        return those[[key_seed(seed, self.name, kind, i) % len(those) for i in index.tolist()]]

    def perturbation(self, index):
        """(B, 3, H, W) in [0, 1] units of the training images `index`; 0 for other classes."""
        import torch

        pool, perturbation = self.fitted["pool"], self.fitted["perturbation"]
        row = torch.searchsorted(pool, index).clamp_max(len(pool) - 1)
        known = pool[row] == index
        return perturbation[row].float() / 255 * known[:, None, None, None]


def checker(size, corners, cell=1):
    """(3, size, size) of -1, 0 and 1: the signs in the lower right corner, or mirrored into all.

    Raises:
        UserError: the patch, or two of them side by side, are larger than the image.
    """
    import torch

    side, corners_beside = 3 * cell, 2 if corners == 4 else 1
    if corners_beside * side > size:
        most = f"at most {size // (3 * corners_beside)}"
        raise UserError(f"lc_cell: {cell}, but images are {size} pixels wide; {most} fits")
    patch = torch.zeros(3, size, size)
    signs = torch.tensor(SIGNS).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    patch[:, -side:, -side:] = signs
    return patch + patch.flip(1) + patch.flip(2) + patch.flip(1, 2) if corners == 4 else patch


if __name__ == "__main__":
    main(LabelConsistent)
