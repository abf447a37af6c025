"""What a set in any layout offers: samples to read, and to write with some of them changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from utils.images.data import LabeledImages


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
        remark: how the set is written, in a sentence, where that is another layout; else empty.
    """

    kind: str
    classes: tuple[str, ...]
    labels: Tensor
    paths: list[str]
    sizes: list[tuple[int, int]]
    left_out: Sequence[str] = ()
    remark: str = ""

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


def fitted(image: np.ndarray, size: tuple[int, int], grey: bool = False) -> np.ndarray:
    """uint8 (3, R, R) -> (H, W, 3), or (H, W) where `grey`, scaled to `size` (PIL bilinear)."""
    picture = Image.fromarray(image.transpose(1, 2, 0)).convert("L" if grey else "RGB")
    if picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(picture)
