"""What a set in any layout offers: samples to read, and to write with some of them changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.images.data import LabeledImages

PLAIN = 1000  # labels 0..K-1 below are class numbers; any others are numbered in ascending order


@dataclass(frozen=True)
class Keys:
    """What a user says about a layout that leaves something open; empty where it is to be found.

    Attributes:
        split: the part that is meant, where a layout holds several.
        image_column, label_column: names of columns in a table.
    """

    split: str = "train"
    image_column: str = ""
    label_column: str = ""


@dataclass(frozen=True)
class Outcome:
    """What becomes of N samples.

    Attributes:
        labels: int64 (N,), as they become.
        images: uint8 (N, 3, R, R), looked at where `replaced`.
        replaced, dropped: bool (N,); a dropped sample is left out.
    """

    labels: Tensor
    images: Tensor
    replaced: Tensor
    dropped: Tensor


class Layout:
    """A set in one layout.

    Attributes:
        kind: what the layout is called.
        classes: class names; label k is the k-th.
        labels: int64 (N,).
        paths: N names by which a person finds a sample.
        sizes: the (height, width) that occur, most common first.
        left_out: names of the files in a folder that are no samples, and are not taken over.
        uses: the fields of `Keys` that mean something to it.
        remark: how the set is written, in a sentence, where that is another layout; else empty.
    """

    kind: str
    classes: tuple[str, ...]
    labels: Tensor
    paths: list[str]
    sizes: list[tuple[int, int]]
    left_out: Sequence[str] = ()
    remark: str = ""
    uses: tuple[str, ...] = ()

    def images(self, size: int) -> Tensor:
        """uint8 (N, 3, size, size), resized (PIL bilinear) where a sample has another size."""
        raise NotImplementedError

    def write(self, folder: Path, outcome: Outcome) -> dict[str, str]:
        """Write the set with `outcome` carried out into an empty folder.

        Returns:
            {name of a sample: what its new image could not keep of its old one's encoding}.
        """
        raise NotImplementedError

    def read(self, size: int) -> LabeledImages:
        return LabeledImages(self.images(size), self.labels)


def numbered(given: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Values of the classes, and labels int64 (N,) that count in them, for integers or text (N,)."""
    if given.dtype.kind in "iu":
        low, high = int(given.min(initial=0)), int(given.max(initial=0))
        values = np.arange(high + 1) if low >= 0 and high < PLAIN else np.unique(given)
        return values, torch.from_numpy(np.searchsorted(values, given))
    texts = sorted(set(given.tolist()), key=_order)
    places = {text: k for k, text in enumerate(texts)}
    return np.array(texts), torch.tensor([places[text] for text in given.tolist()])


def _order(text: str) -> tuple[bool, int, str]:
    """Numbers by their value, before all other text."""
    is_number = text.isdecimal() and len(text) < 19
    return not is_number, int(text) if is_number else 0, text


def fitted(image: np.ndarray, size: tuple[int, int], grey: bool = False) -> np.ndarray:
    """uint8 (3, R, R) -> (H, W, 3), or (H, W) where `grey`, scaled to `size` (PIL bilinear)."""
    picture = Image.fromarray(image.transpose(1, 2, 0)).convert("L" if grey else "RGB")
    if picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(picture)
