"""Control, an oracle: exactly the poisoned samples are removed. What the best possible detection reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from defense.harness.baseline import BaselineConfig as Config
from defense.harness.baseline import Findings, Recipe, drop_and_retrain
from defense.harness.knowledge import TRUTH, oracle_truth
from defense.harness.result import Result
from utils.classifier.training import Observer
from utils.images.data import Dataset, LabeledImages
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

KNOWLEDGE = (TRUTH,)


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: Config,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Remove the poison that the record's truth names, and train on the rest.

    Raises:
        UserError: the record holds no truth.
    """
    recipe = Recipe(config, dataset, victim.device, record, observer)
    return drop_and_retrain(Findings(oracle_truth(record).poison), data, victim, recipe)


if __name__ == "__main__":
    from defense.harness.run import main

    main("oracle_remove")
