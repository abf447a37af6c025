"""Control: trains as DataElixir does, from scratch and then at its fine-tuning rate, on the set as it was received.

What this reaches, DataElixir owes to the epochs that it spends and not to what it changed in the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveFloat, PositiveInt

from defense.elixir.config import DataElixirConfig
from defense.harness.baseline import BaselineConfig, Recipe
from defense.harness.result import Result
from utils.classifier.training import Observer
from utils.images.data import Dataset, LabeledImages
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

KNOWLEDGE = ()


@dataclass(frozen=True)
class Config(BaselineConfig):
    """DataElixir's two trainings, without its purification.

    Args:
        ft_lr: learning rate of the second training.
        ft_epochs: epochs of the second training; null = epochs.
    """

    ft_lr: PositiveFloat = DataElixirConfig.ft_lr
    ft_epochs: PositiveInt | None = None


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: Config,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Train twice on the set as it is."""
    recipe = Recipe(config, dataset, victim.device, record, observer)
    stage1 = recipe.train("benign_stage1", data)
    model = recipe.train(
        "benign", data, stage1, lr=config.ft_lr, epochs=config.ft_epochs or config.epochs
    )
    return Result(model, data, stage1=stage1)


if __name__ == "__main__":
    from defense.harness.run import main

    main("train_longer")
