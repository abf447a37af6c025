"""Control, an oracle: every poisoned sample gets its true label back and keeps its trigger.

What perfect relabelling reaches without purification; the trigger then stands for every class alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from defense.harness.baseline import BaselineConfig as Config
from defense.harness.baseline import Recipe
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
    """Put back the labels that the record's truth names, and train on the result.

    Raises:
        UserError: the record holds no truth.
    """
    relabelled = LabeledImages(data.images, oracle_truth(record).original_labels)
    model = Recipe(config, dataset, victim.device, record, observer).train("benign", relabelled)
    return Result(model, relabelled, flagged=relabelled.labels != data.labels)


if __name__ == "__main__":
    from defense.harness.run import main

    main("oracle_relabel")
