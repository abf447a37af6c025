"""A classifier of a run: read from its folder where it is finished, trained and kept there where it is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from utils.classifier.models import build_classifier, load_weights, save_classifier
from utils.classifier.training import Observer, Trainer
from utils.config import TrainConfig
from utils.images.data import Dataset, LabeledImages
from utils.late import torch

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier


def trained(
    name: str,
    data: LabeledImages,
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    folder: Path,
    observer: Observer | None = None,
    start: Classifier | None = None,
    together: bool = True,
) -> Classifier:
    """The model <name>.safetensors of `folder`, or one trained now, from scratch or from a copy of `start`; in eval mode.

    Args:
        name: names the random stream as well.
        together: by all processes. What must not depend on their number, to the last bit, is trained in one.

    Raises:
        UserError: see `Trainer.fit`; or the file is damaged.
    """
    model = (
        copy.deepcopy(start)
        if start
        else build_classifier(
            config.model, dataset.num_classes, dataset.info, (config.random_seed, name)
        )
    )
    model, file = model.to(device), folder / f"{name}.safetensors"
    if file.exists():
        return load_weights(model, file).eval()
    Trainer(model, config, name, dataset.info.flip, folder / f"{name}.checkpoint.pt", together).fit(
        data, observer
    )
    save_classifier(model, file)
    return model
