"""The keys that all attacks share: which samples are poisoned, and how far a run goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from utils.config import Fraction, NonNegativeInt


@dataclass(frozen=True)
class PoisonConfig:
    """Which samples are poisoned, and how their labels change.

    Args:
        attack: name of the attack; must be the script's.
        attack_label_trans: all2one (every poisoned sample gets attack_target) or all2all (label y
            becomes y + 1).
        attack_target: the class that the trigger should be read as; all2one only.
        pratio: share of the training set (or of the target class, see rate_of) that is poisoned.
        rate_of: what pratio is a share of: all training images, or target_class.
        attack_pool: dirty-label attacks draw from non_target (as DataElixir) or from all classes
            (as BackdoorBench).
    """

    attack: str = ""
    attack_label_trans: Literal["all2one", "all2all"] = "all2one"
    attack_target: NonNegativeInt = 0
    pratio: Fraction = 0.1
    rate_of: Literal["all", "target_class"] = "all"
    attack_pool: Literal["non_target", "all"] = "non_target"


@dataclass(frozen=True)
class RunConfig:
    """The run.

    Args:
        save_folder_name: folder for everything this run produces, below record/; by default
            ATTACK_DATASET.
        defense: name of a module of defense/ that gets the poisoned set.
        stop_after: end the run after this stage.
        export: new folder for the poisoned training set as images, with its labels and, apart, the
            truth.
        dry_run: say what every stage would cost, from a little of it measured on the spot, and
            stop.
    """

    save_folder_name: str | None = None
    defense: str = "dataelixir"
    stop_after: Literal["poison", "victim", "report"] = "report"
    export: str | None = None
    dry_run: bool = False
