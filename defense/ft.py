"""Fine-tuning: the victim is trained further on a few clean images, by its own recipe; nothing is detected.

The simplest repair of a model, a baseline of Liu, Dolan-Gavitt, Garg, "Fine-Pruning", RAID 2018,
https://arxiv.org/abs/1805.12185

Epochs, rate, schedule and augmentation are those that the victim was trained with, where benchmarks choose others for this step.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from defense.baseline import CleanImagesConfig as Config
from defense.baseline import Recipe
from defense.baseline import nothing_to_check as check
from defense.baseline import nothing_to_clean_up as clean_up
from defense.knowledge import CLEAN_IMAGES, clean_images
from defense.result import Result
from utils.data import Dataset, LabeledImages
from utils.record import Record
from utils.training import Observer

if TYPE_CHECKING:
    from utils.networks import Classifier

KNOWLEDGE = (CLEAN_IMAGES,)


def defend(data: LabeledImages, victim: Classifier, config: Config, dataset: Dataset, record: Record,
           observer: Optional[Observer] = None) -> Result:
    """Train a copy of the victim on clean images; `data` is not used again."""
    clean = clean_images(dataset, config.clean_share, config.random_seed)
    return Result(Recipe(config, dataset, victim.device, record, observer).train("benign", clean, victim))


if __name__ == "__main__":
    from defense.run import main

    main("ft")
