"""What a defence is: a frozen dataclass whose fields are its keys, with a method `defend`.

Imports no torch, so that --help and a mistaken key are answered at once; what computes imports it
where it does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from defense.elixir.config import DATAELIXIR_KEYS
from defense.harness.findings import Findings
from defense.harness.knowledge import CLEAN_IMAGES
from utils.config import OpenFraction, TrainConfig, choose_by_name

if TYPE_CHECKING:
    from defense.harness.defense_run import DefenseRun
    from defense.harness.result import Result
    from utils.classifier.networks import Classifier
    from utils.images.data import Dataset, LabeledImages
    from utils.storage.record import Record

NO_DEFENSE = ("__init__", "purify")  # files of defense/ that define none


@dataclass(frozen=True)
class Defense(TrainConfig):
    """Base of all defences; a subclass adds its keys to those of the victim's training.

    Class attributes:
        name: the module's name, in configs and records.
        KNOWLEDGE: what it is told beyond the training set and the victim (knowledge.py).
        PASSED_OVER: keys that a YAML file may hold although this defence has no such key.
    """

    name: ClassVar[str] = ""
    KNOWLEDGE: ClassVar[tuple[str, ...]] = ()
    PASSED_OVER: ClassVar[frozenset[str]] = DATAELIXIR_KEYS

    def __init_subclass__(cls, **words: Any) -> None:
        super().__init_subclass__(**words)
        cls.name = cls.__module__.rpartition(".")[2]

    @property
    def knowledge(self) -> tuple[str, ...]:
        """What it is told with these keys, for the report."""
        return self.KNOWLEDGE

    def check(self, dataset: Dataset) -> None:
        """Raises UserError where the defence cannot serve this data set."""

    def defend(self, data: LabeledImages, victim: Classifier, run: DefenseRun) -> Result:
        """Give back a benign model and, where the method makes one, a sanitized training set.

        Args:
            data: the training set as received.
            victim: a classifier trained on it, in eval mode.
            run: classes, record, device and training recipe of this run.

        Raises:
            UserError: the defence cannot go on, or a training fails.
        """
        raise NotImplementedError

    def costs(self, data: LabeledImages, dataset: Dataset) -> list[str]:
        """Lines that say what the defence would cost on `data`, measured on a little of it."""
        return [self.training_cost(f"{self.name}: at most", data, dataset)]

    def training_cost(self, name: str, data: LabeledImages, dataset: Dataset) -> str:
        """A line that says what its trainings take, a second one for `ft_epochs` among them."""
        from defense.elixir.forecast import training_line

        second = (self.ft_epochs or self.epochs) if hasattr(self, "ft_epochs") else 0
        return training_line(name, data, self, dataset, self.epochs + second)

    def clean_up(self, record: Record) -> None:
        """After a complete run: delete intermediate files."""


@dataclass(frozen=True)
class Detector(Defense):
    """Base of defences that drop the samples they flag, and train on the rest from scratch."""

    def numpy_seed(self, *key: int | str) -> int:
        """The seed of the stream that `key` names, as scikit-learn takes it."""
        from utils.randomness import key_seed

        return key_seed(self.random_seed, *key) % 2**32

    def inspect(self, data: LabeledImages, victim: Classifier, run: DefenseRun) -> Findings:
        """Judge every sample; arguments as those of `defend`."""
        raise NotImplementedError

    def defend(self, data: LabeledImages, victim: Classifier, run: DefenseRun) -> Result:
        with run.record.stage("inspect"):
            found = self.inspect(data, victim, run)
        return run.drop_and_retrain(found, data, victim)


@dataclass(frozen=True)
class ToldCleanImages(Defense):
    """Base of defences that are told some clean images.

    Args:
        clean_share: share of every class of the clean training set that this defence is given.
    """

    KNOWLEDGE: ClassVar[tuple[str, ...]] = (CLEAN_IMAGES,)
    clean_share: OpenFraction = 0.05

    @property
    def knowledge(self) -> tuple[str, ...]:
        return (f"{CLEAN_IMAGES} ({self.clean_share:.3g} of the training set)",)


def find_defense(name: str) -> type[Defense]:
    """The defence that defense/<name>.py defines.

    Raises:
        UserError: there is no such file.
    """
    files = Path(__file__).parent.parent.glob("*.py")
    known = sorted(file.stem for file in files if file.stem not in NO_DEFENSE)
    choose_by_name(name, dict.fromkeys(known), "defense")
    module = importlib.import_module(f"defense.{name}")
    [found] = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Defense)
        and kind.__module__ == module.__name__
    ]
    return found
