"""Sets in a .npz file, read without unpickling."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.config import UserError
from utils.images.decoding import resize_all
from utils.images.layout import Layout, Outcome, fitted
from utils.storage.files import shortened

# names of the two arrays
PAIRS = (("images", "labels"), ("x", "y"), ("x_train", "y_train"), ("data", "labels"))
PLAIN = 1000  # labels 0..K-1 below are class numbers; any others are numbered in ascending order


class ArrayFile(Layout):
    """A .npz file with images and integer labels (N,).

    Images are uint8 (N, H, W, 3), (N, 3, H, W), (N, H, W, 1), (N, 1, H, W) or (N, H, W).

    Raises:
        UserError: not such a file.
    """

    kind = "npz file"

    def __init__(self, file: Path):
        self.file = file
        try:
            with np.load(file, allow_pickle=False) as content:
                self.arrays = {key: content[key] for key in content.files}
        except Exception as error:  # noqa: BLE001 - zipfile and numpy each raise their own
            raise UserError(f"data: {file} cannot be read ({shortened(error)})") from None
        keys = next((pair for pair in PAIRS if set(pair) <= set(self.arrays)), None)
        if keys is None:
            held = ", ".join(self.arrays) or "nothing"
            raise UserError(f"data: {file} holds {held}; expected the arrays images and labels")
        self.keys, (pixels, given) = keys, [self.arrays[key] for key in keys]
        seen, fits = as_hwc(pixels), given.dtype.kind in "iu" and given.size == len(pixels)
        if pixels.dtype != np.uint8 or seen is None or not fits:
            raise UserError(
                f"data: {file}: images must be uint8 (N, H, W, 3) or (N, 3, H, W) and labels "
                f"integers (N,), not {pixels.dtype} {pixels.shape} and {given.dtype} {given.shape}"
            )
        low, high = int(given.min(initial=0)), int(given.max(initial=0))
        self.values = np.arange(high + 1) if low >= 0 and high < PLAIN else np.unique(given)
        self.labels = torch.from_numpy(np.searchsorted(self.values, given.reshape(-1)))
        self.classes = tuple(map(str, self.values))
        self.paths = [f"{file.name}#{k}" for k in range(len(pixels))]
        self.pixels, self.sizes = seen, [seen.shape[1:3]]

    def images(self, size: int) -> Tensor:
        colours = np.ascontiguousarray(np.broadcast_to(self.pixels, (*self.pixels.shape[:3], 3)))
        return torch.from_numpy(resize_all(colours, size))

    def write(self, folder: Path, outcome: Outcome) -> dict[str, str]:
        """The same file name and arrays; arrays other than the two are left as they are."""
        pixels, given = (self.arrays[key].copy() for key in self.keys)
        seen = as_hwc(pixels)
        assert seen is not None
        for k in outcome.replaced.nonzero().flatten().tolist():
            image = fitted(outcome.images[k].numpy(), self.sizes[0], grey=seen.shape[3] == 1)
            seen[k] = image.reshape(seen.shape[1:])
        changed = (outcome.labels != self.labels).numpy()
        given.reshape(-1)[changed] = self.values[outcome.labels.numpy()[changed]]
        kept = ~outcome.dropped.numpy()
        new = {self.keys[0]: pixels[kept], self.keys[1]: given[kept]}
        np.savez(folder / self.file.name, **{**self.arrays, **new})
        return {}


def as_hwc(pixels: np.ndarray) -> np.ndarray | None:
    """A view (N, H, W, 3 or 1) of images; None where the shape is none of images."""
    if pixels.ndim == 3:
        return pixels[..., None]
    if pixels.ndim == 4 and pixels.shape[3] in (1, 3):
        return pixels
    first = pixels.ndim == 4 and pixels.shape[1] in (1, 3)
    return pixels.transpose(0, 2, 3, 1) if first else None
