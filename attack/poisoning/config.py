"""The keys that all attacks share, and what a whole command line says."""

from dataclasses import dataclass
from typing import Any, Literal

from attack.poisoning.trigger import Trigger
from utils.config import DataConfig, Fraction, NonNegativeInt, as_flat_dict

Rank = Literal["smallest", "median", "largest"]


@dataclass(frozen=True)
class PoisonConfig:
    """Which samples are poisoned, and how their labels change.

    Args:
        attack: name of the attack; must be the script's.
        attack_label_trans: all2one (label attack_target) or all2all (label y becomes y + 1).
        attack_target: the class that the trigger should be read as, by number, or smallest, median
            or largest: the class of that rank by training images. Of a list such as [3, 10, 25],
            label y becomes number y mod 3, or the next where that is y itself. all2one only.
        source_class: dirty-label attacks poison this class alone, and ASR is measured on it alone;
            as many images of the other classes but the target carry the trigger under their own
            labels (TaCT, Tang et al., USENIX Security 2021), unless the attack has cover samples
            of its own.
        pratio: share of the training set (or of the target class, see rate_of) that is poisoned.
        rate_of: what pratio is a share of: all training images, or target_class.
        attack_pool: dirty-label attacks draw from non_target (DataElixir) or all (BackdoorBench).
    """

    attack: str = ""
    attack_label_trans: Literal["all2one", "all2all"] = "all2one"
    attack_target: NonNegativeInt | list[NonNegativeInt] | Rank = 0
    source_class: NonNegativeInt | None = None
    pratio: Fraction = 0.1
    rate_of: Literal["all", "target_class"] = "all"
    attack_pool: Literal["non_target", "all"] = "non_target"


@dataclass(frozen=True)
class RunConfig:
    """The run.

    Args:
        save_folder_name: folder of this run below record/; by default ATTACK_DATASET.
        defense: name of a module of defense/ that gets the poisoned set.
        stop_after: end the run after this stage.
        export: new folder for the poisoned training set as images, with labels and truth.
        dry_run: say what every stage would cost, measured on a little of it, and stop.
    """

    save_folder_name: str | None = None
    defense: str = "dataelixir"
    stop_after: Literal["poison", "victim", "report"] = "report"
    export: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Order:
    """A command line that was read; `passed_over` are keys of the YAML file for other defences."""

    run: RunConfig
    data: DataConfig
    poison: PoisonConfig
    defense: Any
    trigger: Trigger
    passed_over: dict[str, Any]

    def keys(self, record_name: str) -> dict[str, Any]:
        """The keys that a record is claimed with: those that its content depends on."""
        run = RunConfig(save_folder_name=record_name, defense=self.run.defense)
        return as_flat_dict(run, self.data, self.poison, self.defense, self.trigger)
