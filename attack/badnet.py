"""BadNets: Gu et al., "Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
arXiv 1708.06733.

x' = (1 - m) x + m p: a small patch p in the lower right corner, wherever the mask m is 1; or
anywhere, in each image at a place of its own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import UserError


@dataclass(frozen=True)
class BadNet(Trigger):
    """BadNets: a patch in a corner, or anywhere.

    Args:
        patch_mask_path: white3x3, black3x3, random3x3 (nine fixed colours), color4x4, or an image
            file whose non-black (with alpha: non-transparent) pixels are the patch.
        patch_place: corner (a file's: where it is in the file), or anywhere: drawn for each image.
        transparent_zero: zero channels of the patch let the image through, as published (4x4).
    """

    LATER_KEYS: ClassVar[dict[str, Any]] = {"patch_place": "corner"}

    name = "badnet"
    patch_mask_path: str = "white3x3"
    patch_place: Literal["corner", "anywhere"] = "corner"
    transparent_zero: bool = False

    def prepare(self, context):
        import torch

        from attack.poisoning.picture import load_patch

        pattern, mask = load_patch(self.patch_mask_path, context.side)
        mask = mask & (pattern > 0) if self.transparent_zero else mask
        if not mask.any():
            raise UserError(
                f"transparent_zero: {self.patch_mask_path} is black all over, so nothing of it "
                "would be seen; leave transparent_zero out"
            )
        seed = torch.tensor(context.seed)
        return self.with_fitted(pattern=pattern.float() / 255, mask=mask, seed=seed)

    def stamp(self, x, index, split):
        pattern, mask = self.fitted["pattern"], self.fitted["mask"]
        if self.patch_place == "anywhere":
            rows, columns = self.sources(index, x.shape[-1])
            moved = lambda whole: whole[:, rows[:, :, None], columns[:, None]].transpose(0, 1)
            pattern, mask = moved(pattern), moved(mask)
        return pattern.where(mask, x)

    def sources(self, index, size):
        """Rows and columns (B, size) of the unmoved patch that each image's own are taken from."""
        import torch

        from utils.randomness import per_sample

        draw = lambda g: torch.rand(2, generator=g)
        drawn = per_sample(draw, index, int(self.fitted["seed"]), self.name)
        covered = self.fitted["mask"].any(0)
        return [self._lines(covered.any(1 - axis), drawn[:, axis]) for axis in (0, 1)]

    def _lines(self, covered, drawn):
        import torch

        lines, size = covered.nonzero().flatten(), len(covered)
        start = (drawn * (size - (lines[-1] - lines[0]))).long()
        return (torch.arange(size) - start[:, None] + lines[0]) % size


if __name__ == "__main__":
    main(BadNet)
