"""Control: no defence. The set stays as it is, and the victim is the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from defense.harness.baseline import BaselineConfig as Config
from defense.harness.result import Result
from utils.classifier.models import save_classifier
from utils.classifier.training import Observer
from utils.images.data import Dataset, LabeledImages
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

KNOWLEDGE = ()


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: Config,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Give back what came in."""
    save_classifier(victim, record / "benign.safetensors")
    return Result(victim, data)


if __name__ == "__main__":
    from defense.harness.run import main

    main("none")
