"""Control: as many samples as another method removes, drawn at random.

What this reaches, the other method owes to a smaller training set and not to what it found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jsonargparse.typing import NonNegativeInt
from jsonargparse.typing import OpenUnitInterval as OpenFraction

from defense.harness.baseline import BaselineConfig, Findings, Recipe, drop_and_retrain
from defense.harness.result import Result
from utils.classifier.training import Observer
from utils.config import UserError
from utils.images.data import Dataset, LabeledImages
from utils.late import torch
from utils.randomness import keyed_generator
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

KNOWLEDGE = ()


@dataclass(frozen=True)
class Config(BaselineConfig):
    """Removal of samples at random.

    Args:
        remove_count: samples to remove; null = remove_share of them.
        remove_share: share of the training set to remove.
    """

    remove_count: NonNegativeInt | None = None
    remove_share: OpenFraction = 0.1


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: Config,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Remove that many samples at random, and train on the rest.

    Raises:
        UserError: more are to be removed than there are.
    """
    n, count = len(data), config.remove_count
    count = round(config.remove_share * n) if count is None else count
    if count > n:
        raise UserError(f"remove_count: {count}, but there are {n} training samples")
    flagged = torch.zeros(n, dtype=torch.bool)
    flagged[
        torch.randperm(n, generator=keyed_generator(config.random_seed, "random_remove"))[:count]
    ] = True
    return drop_and_retrain(
        Findings(flagged), data, victim, Recipe(config, dataset, victim.device, record, observer)
    )


if __name__ == "__main__":
    from defense.harness.run import main

    main("random_remove")
