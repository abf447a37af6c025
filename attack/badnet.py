"""BadNets: Gu et al., "Identifying Vulnerabilities in the Machine Learning Model Supply Chain", arXiv 1708.06733.

x' = (1 - m) x + m p: a small patch p in the lower right corner, wherever the mask m is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from attack.poisoning.run import main
from attack.poisoning.trigger import Trigger
from utils.config import UserError, resolve_path
from utils.images.decoding import open_image
from utils.late import torch

# built-in patches, (h, w, 3) uint8, put into the lower right corner
_2x2 = [[(255, 255, 0), (255, 0, 255)], [(0, 255, 255), (122, 122, 122)]]
PATCHES = {
    "white3x3": np.full((3, 3, 3), 255, np.uint8),  # BackdoorBench's
    "color4x4": np.kron(np.array(_2x2), np.ones((2, 2, 1))).astype(np.uint8),  # DataElixir's
}


@dataclass(frozen=True)
class BadNet(Trigger):
    """BadNets: a patch in a corner.

    Args:
        patch_mask_path: white3x3, color4x4, or an image file whose non-black (with alpha: non-transparent) pixels are the patch.
        transparent_zero: zero channels of the patch let the image through, as in the published 4x4 patch.
    """

    name: ClassVar[str] = "badnet"
    patch_mask_path: str = "white3x3"
    transparent_zero: bool = False

    def prepare(self, context):
        pattern, mask = patch_on(context.dataset.train.images.shape[-1], self.patch_mask_path)
        return self.with_fitted(
            pattern=pattern.float() / 255,
            mask=mask & (pattern > 0) if self.transparent_zero else mask,
        )

    def stamp(self, x, index, split):
        return torch.where(self.fitted["mask"], self.fitted["pattern"], x)


def patch_on(size: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pattern uint8 (3, size, size) and mask bool (1, size, size) of a built-in patch or an image file."""
    if name in PATCHES:
        patch = PATCHES[name]
        if size < len(patch):
            raise UserError(
                f"image_size: {size}, but patch_mask_path {name} is {len(patch)} pixels wide; take larger images, or a file of your own"
            )
        canvas, mask = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), bool)
        canvas[-patch.shape[0] :, -patch.shape[1] :], mask[-patch.shape[0] :, -patch.shape[1] :] = (
            patch,
            True,
        )
    else:
        canvas, mask = _read_patch(name, size)
    return torch.from_numpy(canvas.transpose(2, 0, 1).copy()), torch.from_numpy(mask)[None]


def _read_patch(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        path = resolve_path(name, "patch_mask_path")
        with Image.open(path) as image:
            has_alpha = image.has_transparency_data
            seen = (image if has_alpha else open_image(path)).convert("RGBA")
        rgba = np.asarray(seen.resize((size, size), Image.Resampling.NEAREST))
    except UserError as error:
        raise UserError(f"{error}; built-in patches: {', '.join(PATCHES)}") from None
    except Exception as error:  # each of PIL's readers raises its own on a hostile file
        raise UserError(f"patch_mask_path: {path} is not an image ({str(error)[:80]})") from None
    mask = rgba[..., 3] > 0 if has_alpha else rgba[..., :3].max(-1) > 0
    if not mask.any():
        raise UserError(
            f"patch_mask_path: {path} is {'transparent' if has_alpha else 'black'} all over: no pixel would be changed"
        )
    return rgba[..., :3], mask


if __name__ == "__main__":
    main(BadNet)
