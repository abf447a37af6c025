"""What a defence works with in one run: record, device, and the victim's training recipe."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from defense.harness.findings import Findings
from defense.harness.result import Result
from utils.classifier.models import save_classifier, trained
from utils.classifier.networks import Classifier
from utils.classifier.training import Observer, extract_features
from utils.config import TrainConfig
from utils.images.data import Dataset, LabeledImages
from utils.storage.record import Record

log = logging.getLogger("dataelixir")


@dataclass(frozen=True)
class DefenseRun:
    """One run of a defence; the truth about the set cannot be reached from it.

    Attributes:
        config: the defence, whose training keys are those that the victim was trained with.
        dataset: classes and normalisation.
        record: keeps models and intermediate results, so that an interrupted defence goes on.
        device: where to train.
        observer: told of every epoch.
    """

    config: TrainConfig
    dataset: Dataset
    record: Record
    device: torch.device
    observer: Observer | None = None

    def train(
        self, stage: str, data: LabeledImages, start: Classifier | None = None, **changes: Any
    ) -> Classifier:
        """The model of that stage: from the record, or trained now, maybe from a copy of `start`.

        Args:
            stage: names the model's file, its random stream and its stage in the record.
            data: at least two samples.
            changes: keys of the recipe that are different here.

        Raises:
            UserError: nothing is left to train on, or the training fails.
        """
        recipe, folder = replace(self.config, **changes), self.record.path
        with self.record.stage(stage):
            return trained(
                stage, data, recipe, self.dataset, self.device, folder, self.observer, start
            )

    def keep(self, model: Classifier) -> None:
        """Write the benign model that no training of the record wrote."""
        save_classifier(model, self.record / "benign.safetensors")

    def drop_and_retrain(self, found: Findings, data: LabeledImages, victim: Classifier) -> Result:
        """The samples that are not flagged, and a model trained on them from scratch.

        Where nothing is flagged, the victim is that model already.
        """
        flagged = torch.as_tensor(found.flagged)
        score = None if found.score is None else torch.as_tensor(found.score)
        keep = ~flagged
        log.info("removing %d of %d samples", int(flagged.sum()), len(data))
        if keep.all():
            log.info("the set is left unchanged, and the victim is the benign model")
            self.keep(victim)
        model = victim if keep.all() else self.train("benign", data[keep])
        return Result(model, data, keep=keep, flagged=flagged, score=score, targets=found.targets)

    @staticmethod
    def features(model: Classifier, data: LabeledImages) -> np.ndarray:
        """Pooled features float64 (N, D) of the last layer, without augmentation."""
        return extract_features(model, data.images).double().numpy()
