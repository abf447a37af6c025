"""Control: no defence. The set stays as it is, and the victim is the model."""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from defense.baseline import BaselineConfig as Config
from defense.baseline import nothing_to_check as check
from defense.baseline import nothing_to_clean_up as clean_up
from defense.result import Result
from utils.data import Dataset, LabeledImages
from utils.models import save_classifier
from utils.record import Record
from utils.training import Observer

if TYPE_CHECKING:
    from utils.networks import Classifier

KNOWLEDGE = ()


def defend(data: LabeledImages, victim: Classifier, config: Config, dataset: Dataset, record: Record,
           observer: Optional[Observer] = None) -> Result:
    """Give back what came in."""
    save_classifier(victim, record / "benign.safetensors")
    return Result(victim, data)


if __name__ == "__main__":
    from defense.run import main

    main("none")
