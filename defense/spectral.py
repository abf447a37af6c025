"""Spectral signatures: Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018,
https://arxiv.org/abs/1811.00636

In the class that the poison is labelled as, two groups with different means make a direction of
large variance. So in each class (by given label) the features are centred, and a sample's score is
the square of its coordinate along the top right singular vector (Algorithm 1). The highest scores
are removed from every class, 1.5 times as many as there is poison; that number has to be told.

Where poison is half of a class or more, both groups lie equally far from the mean and the score
cannot tell them apart, and at 10 % of all samples the budget is half of every class: the method was
made for rarer poison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from defense.harness.command import main
from defense.harness.defense import Detector
from defense.harness.findings import Findings
from defense.harness.knowledge import POISON_RATE, poison_rate
from utils.config import OpenFraction

MARGIN = 1.5  # of the poison, as published


@dataclass(frozen=True)
class Spectral(Detector):
    """Spectral signatures.

    Args:
        budget: what is removed from each class: 1.5 times the number of poisoned samples in all, at
            most half of the class (rate; is told the poison rate), or class_share of it (share; is
            told nothing).
        class_share: share of every class that is removed under budget share.
    """

    KNOWLEDGE = (POISON_RATE,)
    budget: Literal["rate", "share"] = "rate"
    class_share: OpenFraction = 0.15

    @property
    def knowledge(self) -> tuple[str, ...]:
        return self.KNOWLEDGE if self.budget == "rate" else ()

    def inspect(self, data, victim, run):
        rate = poison_rate(run.record) if self.budget == "rate" else None
        features = run.features(victim, data)
        return find_poison(features, data.labels.numpy(), rate, self.class_share)


def spectral_scores(features: np.ndarray) -> np.ndarray:
    """Squared coordinates (n,) of one class's centred features (n, D) along the top direction."""
    centred = features - features.mean(0)
    return (centred @ np.linalg.svd(centred, full_matrices=False)[2][0]) ** 2


def find_poison(
    features: np.ndarray, labels: np.ndarray, poison_rate: float | None, class_share: float
) -> Findings:
    """Score every sample within its class and flag the highest scores of each class.

    Args:
        features: float (N, D).
        labels: int (N,), given labels.
        poison_rate: of all samples, in [0, 1]; None = take class_share of each class.
        class_share: in (0, 1).
    """
    score, flagged = np.zeros(len(labels)), np.zeros(len(labels), dtype=bool)
    # the whole number again: in floating point the product can fall short of it
    told = round((poison_rate or 0) * len(labels))
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        score[own] = spectral_scores(features[own])
        budget = min(int(MARGIN * told), len(own) // 2)
        if poison_rate is None:
            budget = int(class_share * len(own))
        flagged[own[np.argsort(-score[own], kind="stable")[:budget]]] = True
    return Findings(flagged, score)


if __name__ == "__main__":
    main("spectral")
