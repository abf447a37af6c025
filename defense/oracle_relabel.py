"""Control, an oracle: every poisoned sample gets its true label back and keeps its trigger.

What perfect relabelling reaches without purification; the trigger then stands for every class alike.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from defense.baseline import BaselineConfig as Config
from defense.baseline import Recipe
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
    """Put back the labels that the record's truth names, and train on the result.

    Raises:
        UserError: the record holds no truth.
    """
    relabelled = LabeledImages(data.images, told_truth(record).original_labels)
    model = Recipe(config, dataset, victim.device, record, observer).train("benign", relabelled)
    return Result(model, relabelled, flagged=relabelled.labels != data.labels)


if __name__ == "__main__":
    from defense.run import main

    main("oracle_relabel")
