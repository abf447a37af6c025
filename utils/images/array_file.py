"""Sets in a .npz file, read without unpickling."""

import copy
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.config import UserError
from utils.images.decoding import resize_all
from utils.images.layout import Keys, Layout, Outcome, fitted, numbered
from utils.storage.files import shortened

MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes
# names of the two arrays, and of those of a part
PAIRS = (("images", "labels"), ("x", "y"), ("data", "labels"))
PARTS = (("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("X_{}", "y_{}"))


class ArrayFile(Layout):
    """A .npz file with images and integer labels (N,) or (N, 1).

    Images are uint8 (N, H, W, 3), (N, 3, H, W), (N, H, W, 1), (N, 1, H, W) or (N, H, W). The two
    arrays are images and labels, or those of the part that `keys.split` names, as train_images and
    train_labels or x_train and y_train. No other array is read.

    Raises:
        UserError: not such a file.
    """

    kind = "npz file"

    def __init__(self, file: Path, keys: Keys = Keys()):  # noqa: B008 - it is frozen
        self.file = file
        try:
            with np.load(file, allow_pickle=False) as content:
                self.names = self._pair(list(content.files), keys.split)
                self._refuse_large(content.zip)
                pixels, given = (content[name] for name in self.names)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - zipfile and numpy each raise their own
            raise UserError(f"data: {file} cannot be read ({shortened(error)})") from None
        seen = as_hwc(pixels)
        if pixels.dtype != np.uint8 or seen is None or given.dtype.kind not in "iu":
            raise UserError(
                f"data: {file}: images must be uint8 (N, H, W, 3) or (N, 3, H, W) and labels "
                f"integers (N,), not {pixels.dtype} {pixels.shape} and {given.dtype} {given.shape}"
            )
        if given.size != len(pixels) or given.shape[:1] != (len(pixels),):
            counts = f"{given.size} labels for {len(pixels)} images"
            raise UserError(f"data: {file}: {counts}; give one label for each image")
        if (low := int(given.min(initial=0))) < 0:
            advice = "number classes from 0, and leave samples without a class out"
            raise UserError(f"data: {file}: a label is {low}, which is no class; {advice}")
        self.arrays = pixels, given
        self.values, self.labels = numbered(given.reshape(-1))
        self.classes = tuple(map(str, self.values))
        self.paths = [f"{file.name}#{k}" for k in range(len(pixels))]
        self.pixels, self.sizes = seen, [seen.shape[1:3]]

    def _pair(self, held: list[str], split: str) -> tuple[str, str]:
        """Names of the two arrays among those `held`."""
        pair = next((pair for pair in PAIRS if set(pair) <= set(held)), None)
        if pair:
            return pair
        self.uses = ("split",)
        pairs = [(images.format(split), labels.format(split)) for images, labels in PARTS]
        pair = next((pair for pair in pairs if set(pair) <= set(held)), None)
        if pair is None:
            expected = ", or ".join(" and ".join(names) for names in (PAIRS[0], *pairs[:2]))
            listed = ", ".join(held) or "nothing"
            raise UserError(
                f"data: {self.file} holds {listed}; expected the arrays {expected} "
                "(--split names the part)"
            )
        return pair

    def _refuse_large(self, packed: zipfile.ZipFile) -> None:
        """A small file can unfold to more than memory holds."""
        size = sum(packed.getinfo(f"{name}.npy").file_size for name in self.names)
        if size > MEMORY:
            told = f"unfolds to {size:,} bytes, more than the memory of this machine"
            raise UserError(f"data: {self.file} {told}; clean it in parts")

    def images(self, size: int) -> Tensor:
        colours = np.ascontiguousarray(np.broadcast_to(self.pixels, (*self.pixels.shape[:3], 3)))
        return torch.from_numpy(resize_all(colours, size))

    def write(self, folder: Path, outcome: Outcome) -> dict[str, str]:
        """The same file name and arrays; those other than the two are copied as they are."""
        pixels, given = (array.copy() for array in self.arrays)
        seen = as_hwc(pixels)
        assert seen is not None
        for k in outcome.replaced.nonzero().flatten().tolist():
            image = fitted(outcome.images[k].numpy(), self.sizes[0], grey=seen.shape[3] == 1)
            seen[k] = image.reshape(seen.shape[1:])
        changed = (outcome.labels != self.labels).numpy()
        given.reshape(-1)[changed] = self.values[outcome.labels.numpy()[changed]]
        kept = ~outcome.dropped.numpy()
        new = {f"{name}.npy": array[kept] for name, array in zip(self.names, (pixels, given))}
        with (
            zipfile.ZipFile(self.file) as source,
            zipfile.ZipFile(folder / self.file.name, "w") as target,
        ):
            for member in source.infolist():
                as_before = copy.copy(member)
                as_before.file_size = new[member.filename].nbytes if member.filename in new else 0
                with target.open(as_before, "w", force_zip64=True) as file:
                    if member.filename in new:
                        np.lib.format.write_array(file, new[member.filename], allow_pickle=False)
                    else:
                        with source.open(member) as old:
                            shutil.copyfileobj(old, file)
        return {}


def as_hwc(pixels: np.ndarray) -> np.ndarray | None:
    """A view (N, H, W, 3 or 1) of images; None where the shape is none of images."""
    if pixels.ndim == 3:
        return pixels[..., None]
    if pixels.ndim == 4 and pixels.shape[3] in (1, 3):
        return pixels
    first = pixels.ndim == 4 and pixels.shape[1] in (1, 3)
    return pixels.transpose(0, 2, 3, 1) if first else None
