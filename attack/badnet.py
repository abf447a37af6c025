"""BadNets: Gu et al., "Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
arXiv 1708.06733.

x' = (1 - m) x + m p: a small patch p in the lower right corner, wherever the mask m is 1.
"""

from dataclasses import dataclass

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger


@dataclass(frozen=True)
class BadNet(Trigger):
    """BadNets: a patch in a corner.

    Args:
        patch_mask_path: white3x3, color4x4, or an image file whose non-black (with alpha:
            non-transparent) pixels are the patch.
        transparent_zero: zero channels of the patch let the image through, as published (4x4).
    """

    name = "badnet"
    patch_mask_path: str = "white3x3"
    transparent_zero: bool = False

    def prepare(self, context):
        from attack.poisoning.picture import load_patch

        pattern, mask = load_patch(self.patch_mask_path, context.side)
        mask = mask & (pattern > 0) if self.transparent_zero else mask
        return self.with_fitted(pattern=pattern.float() / 255, mask=mask)

    def stamp(self, x, index, split):
        return self.fitted["pattern"].where(self.fitted["mask"], x)


if __name__ == "__main__":
    main(BadNet)
