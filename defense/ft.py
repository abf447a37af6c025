"""Fine-tuning: the victim is trained further on a few clean images, by its own recipe; nothing is detected.

The simplest repair of a model, a baseline of Liu, Dolan-Gavitt, Garg, "Fine-Pruning", RAID 2018,
https://arxiv.org/abs/1805.12185

Epochs, rate, schedule and augmentation are those that the victim was trained with, where benchmarks choose others for this step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from defense.harness.baseline import CleanImagesConfig as Config
from defense.harness.baseline import Recipe
from defense.harness.knowledge import CLEAN_IMAGES, clean_images
from defense.harness.result import Result
from utils.classifier.training import Observer
from utils.images.data import Dataset, LabeledImages
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

KNOWLEDGE = (CLEAN_IMAGES,)


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: Config,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Train a copy of the victim on clean images; `data` is not used again."""
    clean = clean_images(dataset, config.clean_share, config.random_seed)
    return Result(
        Recipe(config, dataset, victim.device, record, observer).train("benign", clean, victim)
    )


if __name__ == "__main__":
    from defense.harness.run import main

    main("ft")
