"""Blended: Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
arXiv 1712.05526.

x' = (1 - a) x + a T: a whole picture T shines through the image.
"""

from dataclasses import dataclass

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import Fraction


@dataclass(frozen=True)
class Blended(Trigger):
    """Blended: a picture over the whole image.

    Args:
        attack_trigger_img_path: cartoon, leaves, clouds, grain, hills, noise (all drawn by
            the program), or an image file.
        alpha_train: share of the picture in poisoned training images.
        alpha_test: share of the picture in triggered test images.
    """

    name = "blended"
    attack_trigger_img_path: str = "cartoon"
    alpha_train: Fraction = 0.2
    alpha_test: Fraction = 0.2

    def prepare(self, context):
        from attack.poisoning.picture import load_picture

        return self.with_fitted(picture=load_picture(self.attack_trigger_img_path, context.side))

    def stamp(self, x, index, split):
        alpha = self.alpha_train if split == "train" else self.alpha_test
        return (1 - alpha) * x + alpha * self.fitted["picture"]


if __name__ == "__main__":
    main(Blended)
