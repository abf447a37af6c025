"""Sets in a .npz file, read without unpickling."""

from __future__ import annotations

from collections.abc import Sequence
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
# labels 0..K-1 below this are class numbers; any others are numbered in ascending order
PLAIN = 1000


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
        self.keys = keys
        pixels, given = (self.arrays[key] for key in keys)
        self.axes, integers = _axes(pixels.shape), given.dtype.kind in "iu"
        if pixels.dtype != np.uint8 or not self.axes or not integers or given.size != len(pixels):
            raise UserError(
                f"data: {file}: images must be uint8 (N, H, W, 3) or (N, 3, H, W) and labels "
                f"integers (N,), not {pixels.dtype} {pixels.shape} and {given.dtype} {given.shape}"
            )
        low, high = int(given.min(initial=0)), int(given.max(initial=0))
        self.values = np.arange(high + 1) if low >= 0 and high < PLAIN else np.unique(given)
        self.labels = torch.from_numpy(np.searchsorted(self.values, given.reshape(-1)))
        self.classes = tuple(map(str, self.values))
        self.paths = [f"{file.name}#{k}" for k in range(len(pixels))]
        self.sizes = [self._as_hwc(pixels[:1]).shape[1:3]]

    def _as_hwc(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3 or 1), a view."""
        if self.axes == "grey":
            return pixels[..., None]
        return pixels.transpose(0, 2, 3, 1) if self.axes == "first" else pixels

    def images(self, size: int) -> Tensor:
        pixels = self._as_hwc(self.arrays[self.keys[0]])
        colours = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))
        return torch.from_numpy(resize_all(colours, size))

    def write(self, folder: Path, outcome: Outcome) -> None:
        """The same file name and arrays; arrays other than the two are left as they are."""
        pixels, given = (self.arrays[key].copy() for key in self.keys)
        seen = self._as_hwc(pixels)
        for k in outcome.replaced.nonzero().flatten().tolist():
            image = fitted(outcome.images[k].numpy(), self.sizes[0], grey=seen.shape[3] == 1)
            seen[k] = image.reshape(seen.shape[1:])
        changed = (outcome.labels != self.labels).numpy()
        given.reshape(-1)[changed] = self.values[outcome.labels.numpy()[changed]]
        kept = ~outcome.dropped.numpy()
        new = {self.keys[0]: pixels[kept], self.keys[1]: given[kept]}
        np.savez(folder / self.file.name, **{**self.arrays, **new})


def _axes(shape: Sequence[int]) -> str:
    """Where the channels of images of this shape are: last, first or grey (no such axis).

    Empty where it is no shape of images.
    """
    if len(shape) == 3:
        return "grey"
    if len(shape) == 4 and shape[3] in (1, 3):
        return "last"
    return "first" if len(shape) == 4 and shape[1] in (1, 3) else ""
