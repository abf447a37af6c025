"""What the baseline defences share: the victim's recipe applied to another set, and what follows from suspected samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jsonargparse.typing import OpenUnitInterval as OpenFraction

from defense.elixir.config import DataElixirConfig
from defense.harness.knowledge import CLEAN_IMAGES
from defense.harness.result import Result
from utils.classifier.models import save_classifier
from utils.classifier.trained import trained
from utils.classifier.training import Observer, extract_features
from utils.config import TrainConfig, UserError
from utils.images.data import Dataset, LabeledImages
from utils.late import Tensor, torch
from utils.randomness import key_seed
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")


@dataclass(frozen=True)
class BaselineConfig(TrainConfig):
    __doc__ = TrainConfig.__doc__
    PASSED_OVER: ClassVar[frozenset[str]] = frozenset(
        f.name for f in fields(DataElixirConfig)
    )  # may stand in a YAML file


@dataclass(frozen=True)
class CleanImagesConfig(BaselineConfig):
    """A defence that is told some clean images.

    Args:
        clean_share: share of every class of the clean training set that this defence is given.
    """

    clean_share: OpenFraction = 0.05

    @property
    def knowledge(self) -> tuple[str, ...]:
        return (f"{CLEAN_IMAGES} ({self.clean_share:.3g} of the training set)",)


def nothing_to_check(config: Any, dataset: Dataset) -> None:
    """The `check` of a defence that can serve every data set."""


def nothing_to_clean_up(config: Any, record: Record) -> None:
    """The `clean_up` of a defence that leaves nothing but its results."""


@dataclass(frozen=True)
class Recipe:
    """How the victim was trained, ready to be applied to other sets.

    Attributes:
        config: the victim's keys.
        dataset: classes and normalisation.
        device: where to train.
        record: keeps the models, so that an interrupted defence goes on.
        observer: told of every epoch.
    """

    config: TrainConfig
    dataset: Dataset
    device: torch.device
    record: Record
    observer: Observer | None = None

    def train(
        self, stage: str, data: LabeledImages, start: Classifier | None = None, **changes: Any
    ) -> Classifier:
        """The model of that stage from the record, or trained now, from scratch or from a copy of `start`.

        Args:
            stage: names the model's file, its random stream and its stage in the record.
            data: at least two samples.
            changes: keys of the recipe that are different here.

        Raises:
            UserError: nothing is left to train on, or the training fails.
        """
        if len(data) < 2:
            raise UserError(
                f"{stage}: {len(data)} training samples are left; loosen what this defence removes"
            )
        config = replace(self.config, **changes)
        with self.record.stage(stage):
            return trained(
                stage,
                data,
                config,
                self.dataset,
                self.device,
                self.record.path,
                self.observer,
                start,
            )


@dataclass(frozen=True)
class Findings:
    """What an inspection says about N samples.

    Attributes:
        flagged: bool (N,), taken for poisoned.
        score: float64 (N,), higher = more suspicious; None where the method ranks nothing.
        targets: classes taken for target labels; None where the method does not ask.
    """

    flagged: Tensor
    score: Tensor | None = None
    targets: tuple[int, ...] | None = None


def drop_and_retrain(
    found: Findings, data: LabeledImages, victim: Classifier, recipe: Recipe
) -> Result:
    """The samples that are not flagged, and a model trained on them from scratch by the victim's recipe.

    Where nothing is flagged, the victim is that model already.
    """
    keep = ~found.flagged
    log.info("removing %d of %d samples", int(found.flagged.sum()), len(data))
    if keep.all():
        log.info("the set is left unchanged, and the victim is the benign model")
        save_classifier(victim, recipe.record / "benign.safetensors")
    model = victim if keep.all() else recipe.train("benign", data[keep])
    return Result(
        model, data, keep=keep, flagged=found.flagged, score=found.score, targets=found.targets
    )


def victim_features(victim: Classifier, data: LabeledImages) -> np.ndarray:
    """Pooled features of the last layer as the victim sees the images, without augmentation: float64 (N, D)."""
    return extract_features(victim, data.images).double().numpy()


def numpy_seed(*key: int | str) -> int:
    """The seed of the stream that `key` names, as scikit-learn takes it."""
    return key_seed(*key) % 2**32
