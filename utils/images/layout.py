"""What a set in any layout offers: samples to read, and to write with some of them changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.config import UserError
from utils.images.data import LabeledImages
from utils.images.decoding import class_order

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
        reasons: {reason: names} of the files in a folder that are no samples, and are not taken
            over.
        found: how many files were found; None where files are not what holds the samples.
        uses: the fields of `Keys` that mean something to it.
        remark: how the set is written, in a sentence, where that is another layout; else empty.
    """

    kind: str
    classes: tuple[str, ...]
    labels: Tensor
    paths: list[str]
    sizes: list[tuple[int, int]]
    reasons: Mapping[str, Sequence[str]] = MappingProxyType({})
    found: int | None = None
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

    def account(self) -> dict[str, Any]:
        """How many samples or files were found and analysed, and left out by reason; UserError
        where one is not accounted for, which is a fault of this program."""
        analysed, out = len(self.labels), {key: len(self.reasons[key]) for key in self.reasons}
        found = analysed + sum(out.values()) if self.found is None else self.found
        if found != analysed + sum(out.values()):
            told = f"of {found} files {analysed} are read and {sum(out.values())} left out"
            raise UserError(
                f"data: {told}, which does not add up; this is a fault, please report it"
            )
        return {"found": found, "analysed": analysed, "left_out": out}

    @property
    def left_out(self) -> list[str]:
        """The names of all files that are no samples."""
        return sorted(name for names in self.reasons.values() for name in names)

    @property
    def empty(self) -> list[str]:
        """The names of the classes without a sample."""
        present = set(self.labels.tolist())
        return [name for label, name in enumerate(self.classes) if label not in present]

    def read(self, size: int) -> LabeledImages:
        return LabeledImages(self.images(size), self.labels)


def numbered(given: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Values of the classes, and labels int64 (N,) that count in them, for integers or text (N,)."""
    if given.dtype.kind in "iu":
        low, high = int(given.min(initial=0)), int(given.max(initial=0))
        values = np.arange(high + 1) if low >= 0 and high < PLAIN else np.unique(given)
        return values, torch.from_numpy(np.searchsorted(values, given))
    texts = sorted(set(given.tolist()), key=class_order)
    places = {text: k for k, text in enumerate(texts)}
    return np.array(texts), torch.tensor([places[text] for text in given.tolist()])


def fitted(image: np.ndarray, size: tuple[int, int], grey: bool = False) -> np.ndarray:
    """uint8 (3, R, R) -> (H, W, 3), or (H, W) where `grey`, scaled to `size` (PIL bilinear)."""
    picture = Image.fromarray(image.transpose(1, 2, 0)).convert("L" if grey else "RGB")
    if picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(picture)
