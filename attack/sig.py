"""SIG: Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption without Label
Poisoning", arXiv 1902.11237.

X' = X + D sin(2 pi j f / W): vertical stripes, the same in every row and channel, on images of the
target class only; or horizontal ones.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import PositiveFloat


@dataclass(frozen=True)
class Sig(Trigger):
    """SIG: a sinusoid over the columns or the rows, with clean labels.

    Args:
        delta_train: amplitude D in poisoned training images, in levels of 255.
        delta_test: amplitude D in triggered test images.
        sig_f: periods f over the width W of an image.
        sig_axis: columns (vertical stripes, as published) or rows (horizontal ones).
    """

    LATER_KEYS: ClassVar[dict[str, Any]] = {"sig_axis": "columns"}

    name = "sig"
    label_mode = "clean"
    delta_train: PositiveFloat = 40.0
    delta_test: PositiveFloat = 40.0
    sig_f: PositiveFloat = 6.0
    sig_axis: Literal["columns", "rows"] = "columns"

    def stamp(self, x, index, split):
        import torch

        width = x.shape[-1]
        along = torch.arange(width, dtype=torch.float64)
        wave = torch.sin(2 * math.pi * self.sig_f / width * along).float()
        wave = wave if self.sig_axis == "columns" else wave[:, None]
        return x + (self.delta_train if split == "train" else self.delta_test) / 255 * wave


if __name__ == "__main__":
    main(Sig)
