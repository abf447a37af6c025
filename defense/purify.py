"""Clean a set of labelled images of your own:

    python defense/purify.py --data DIR --out DIR --ddpm DENOISER

DIR is a folder of class folders or with a table, a .npz file, a Hugging Face folder, tar archives
of webdataset, a folder of CIFAR's python files, or the name of a record. A classifier is trained on the set (or given by --victim), DataElixir decides, and OUT gets
cleaned/ (the set in its own layout; CIFAR's as .npz), decisions.csv, summary.json and report.html.
The input is only read. Without anything found, nothing is changed.

From Python, on tensors or arrays: `from defense import purify; purify.clean(images, labels,
config=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense.elixir.config import DataElixirConfig
from defense.harness.defense import find_defense
from defense.own_data.config import CleanConfig
from utils.config import command_line, parse_config
from utils.processes import leading_process

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.utils.data import Dataset

    from defense.own_data.cleaning import Cleaned
    from utils.classifier.networks import Classifier


def clean(
    data: Tensor | np.ndarray | Dataset,
    labels: Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    config: DataElixirConfig,
    victim: Classifier | None = None,
    classes: Sequence[str] | None = None,
    folder: Path | None = None,
) -> Cleaned:
    """Clean a set that is in memory.

    Args:
        data: images uint8 (N, 3, H, W) or (N, H, W, 3), or floats in [0, 1] of these shapes
            (rounded to 256 levels), as a tensor or an array; or a torch Dataset of (image, label)
            pairs with images (3, H, W) or (H, W, 3) of these kinds, or PIL's, which are read as
            files are: 16 bits scaled to 8, transparency over white; or a Dataset of Hugging Face
            with columns image and label. All images are of one size.
        labels: integers (N,), 0..K-1, three classes or more with samples; None where `data` is a
            Dataset, whose labels are integers too.
        config: keys of DataElixir; `config.ddpm` names the denoiser, which must be for images of
            this size.
        victim: a classifier trained on the set; a copy of it works on `config.device`. By default
            one is trained.
        classes: a name for each class, K or more (a class may have no samples); by default the
            names that a Dataset of Hugging Face has, or the numbers.
        folder: where the run's files stay, so that one that was interrupted goes on; by default
            they are deleted. Going on is for interrupted runs only: on the folder of a complete one
            images are purified again, as the intermediaries, and `result.examples` with them, stay
            after a complete run only with `config.keep_intermediaries`.

    Raises:
        UserError: images, labels or names that do not fit, fewer than two classes with samples,
            no such denoiser, or whatever stops a training.
    """
    from defense.own_data.cleaning import clean_in_memory

    keys = {field.name: getattr(config, field.name) for field in fields(config)}
    defense: Any = find_defense("dataelixir")(**keys)
    return clean_in_memory(data, labels, defense, victim, classes, folder)


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Clean the set that the command line names."""
    with leading_process() as leading:
        if leading:
            kinds = CleanConfig, find_defense("dataelixir")
            order, defense = parse_config(argv, *kinds, description=__doc__)
            from defense.own_data.cleaning import clean_given

            clean_given(order, defense)


if __name__ == "__main__":
    main()
