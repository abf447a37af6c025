"""Control, an oracle: exactly the poisoned samples are removed. What the best possible detection reaches."""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from defense.baseline import BaselineConfig as Config
from defense.baseline import Findings, Recipe, drop_and_retrain
from defense.baseline import nothing_to_check as check
from defense.baseline import nothing_to_clean_up as clean_up
from defense.knowledge import TRUTH, told_truth
from defense.result import Result
from utils.data import Dataset, LabeledImages
from utils.record import Record
from utils.training import Observer

if TYPE_CHECKING:
    from utils.networks import Classifier

KNOWLEDGE = (TRUTH,)


def defend(data: LabeledImages, victim: Classifier, config: Config, dataset: Dataset, record: Record,
           observer: Optional[Observer] = None) -> Result:
    """Remove the poison that the record's truth names, and train on the rest.

    Raises:
        UserError: the record holds no truth.
    """
    recipe = Recipe(config, dataset, victim.device, record, observer)
    return drop_and_retrain(Findings(told_truth(record).poison), data, victim, recipe)


if __name__ == "__main__":
    from defense.run import main

    main("oracle_remove")
