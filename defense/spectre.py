"""SPECTRE: Hayase, Kong, Somani, Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust
Statistics", ICML 2021, https://arxiv.org/abs/2104.11315

Spectral signatures fail where the poison's direction is not the one of largest variance. So each
class's features are projected to k dimensions and whitened by a mean and a covariance that poison
can hardly move; what then still varies more than a unit Gaussian is poison, and quantum entropy
scores measure it, between squared norm (alpha = 0) and squared coordinate along the top direction
(alpha = infinity). k is the one whose removal lets what is left whiten the class best, in the sense
that the rest stands out most; the class in which it stands out most is the target, and loses its
highest scores.

Deviations. The robust mean and covariance are scikit-learn's minimum covariance determinant; the
published code filters iteratively. k is at most a quarter of a class's samples, and classes of
fewer than 20 are passed over: neither has a covariance worth the name. Directions in which a class
does not vary keep a little variance instead of none, so that a channel that is dead but for the
poison counts. Poison that is more compact than the rest passes for the rest from a fifth to a
quarter of its class on (tests: found at 18 %, missed at 30 %).

A limit of the published choice of the target, which is kept: how far something stands out is
compared between classes whatever their sizes, and small ones stand out by chance (see `Filtered`).
Beside a large poisoned class a small clean one can be chosen instead, and loses samples, while the
poison stays.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from defense.harness.command import main
from defense.harness.defense import Detector
from defense.harness.findings import Findings
from defense.harness.knowledge import POISON_RATE, poison_rate

ALPHA, MARGIN = 4.0, 1.5  # as published
DIMENSIONS = np.unique(np.round(np.linspace(1, 8, 8) ** 2)).astype(int)  # 1, 4, 9, ..., 64
# the share of a class that can be taken for poison; less where the class is small
SMALL, MOST, MOST_OF_SMALL = 500, 0.33, 0.1
LEAST = 20  # samples of a class that is looked at
FLOOR = 1e-6  # variance that every direction has at least, of the class's largest


@dataclass(frozen=True)
class Spectre(Detector):
    """SPECTRE; is told the poison rate."""

    KNOWLEDGE = (POISON_RATE,)

    def costs(self, data, dataset):
        inspection = "spectre: inspection, which takes minutes more than this; then at most"
        return [self.training_cost(inspection, data, dataset)]

    def inspect(self, data, victim, run):
        rate, seed = poison_rate(run.record), self.numpy_seed("spectre")
        return find_poison(run.features(victim, data), data.labels.numpy(), rate, seed)


@dataclass(frozen=True)
class Filtered:
    """What filtering one class gives.

    Attributes:
        score: float64 (n,), higher = more suspicious.
        removed: bool (n,).
        stands_out: mean quantum entropy score of the class, whitened by what is left of it: more
            than 1 of a Gaussian as well, since what is left without its highest scores is narrower
            than the whole, and the more so the fewer samples there are. Of 128 Gaussian features,
            of which 5 to 10 % are expected to be poison, it is 2.3 to 3.9 at n = 60 and 1.4 to 1.7
            at n = 630.
    """

    score: np.ndarray
    removed: np.ndarray
    stands_out: float


def quantum_scores(whitened: np.ndarray) -> np.ndarray:
    """Quantum entropy scores (n,) of whitened, centred rows (n, k): h' Q h / tr Q.

    Q is a matrix exponential of their covariance.
    """
    from scipy.linalg import expm

    covariance = whitened.T @ whitened / len(whitened)
    norm = np.linalg.norm(covariance, 2)
    excess = np.zeros_like(covariance)
    if norm > 1:
        excess = (covariance - np.eye(len(covariance))) / max(norm - 1, 1e-9)
    weights = expm(ALPHA * excess)
    return ((whitened @ weights) * whitened).sum(1) / np.trace(weights)


def whiten(rows: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Rows (n, k) in units of that Gaussian, whose variance is FLOOR or more in every direction."""
    values, vectors = np.linalg.eigh(covariance)
    return (rows - mean) @ vectors / np.sqrt(values.clip(min=FLOOR))


def robust_gaussian(rows: np.ndarray, expected: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (k,) and covariance (k, k) of rows (n, k), whatever at most `expected` of them are.

    Variances are of the order of 1 or less.
    """
    from sklearn.covariance import MinCovDet

    n, k = rows.shape
    # Noise: where nothing but poison varies, the rest's covariance has no inverse, and a
    # pseudo-inverse lets the poison back in.
    # A second column: of one, scikit-learn takes a window of one sample more than told, which then
    # ends in the poison.
    noisy = np.pad(rows, ((0, 0), (0, int(k == 1))))
    noisy = noisy + np.random.default_rng(seed).normal(0, FLOOR**0.5, noisy.shape)
    with warnings.catch_warnings():
        # Of determinants that grew by a rounding error; the smaller one is kept.
        warnings.simplefilter("ignore", RuntimeWarning)
        support = (n - expected + 0.5) / n  # n - expected rows: the half is rounded off
        found = MinCovDet(support_fraction=support, random_state=seed).fit(noisy)
    return found.location_[:k], found.covariance_[:k, :k]


def filter_class(features: np.ndarray, expected: int, seed: int) -> Filtered:
    """The 1.5 times `expected` samples of one class that stand out most, for the best k.

    Args:
        features: float (n, D), not all alike.
    """
    from sklearn.decomposition import PCA

    n, most = len(features), min(DIMENSIONS[-1], features.shape[1], len(features) // 4)
    all_dimensions = PCA(int(most), random_state=seed).fit_transform(features)
    all_dimensions /= all_dimensions[:, 0].std()
    best = Filtered(np.zeros(n), np.zeros(n, dtype=bool), -np.inf)
    for k in DIMENSIONS[most >= DIMENSIONS]:
        rows = all_dimensions[:, :k]
        score = quantum_scores(whiten(rows, *robust_gaussian(rows, expected, seed)))
        removed = np.zeros(n, dtype=bool)
        removed[np.argsort(-score, kind="stable")[: int(MARGIN * expected)]] = True
        left = all_dimensions[~removed]
        white = whiten(all_dimensions, left.mean(0), np.atleast_2d(np.cov(left.T)))
        stands_out = quantum_scores(white).mean()
        if stands_out > best.stands_out:
            best = Filtered(score, removed, float(stands_out))
    return best


def find_poison(
    features: np.ndarray, labels: np.ndarray, poison_rate: float, seed: int
) -> Findings:
    """Filter every class, and flag in the one in which the removed samples stand out most.

    Args:
        features: float (N, D).
        labels: int (N,), given labels.
        poison_rate: of all samples, in [0, 1].
        seed: of projections and robust estimates.
    """
    score, flagged, filtered = np.zeros(len(labels)), np.zeros(len(labels), dtype=bool), {}
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        most = int((MOST if len(own) >= SMALL else MOST_OF_SMALL) * len(own))
        expected = min(round(poison_rate * len(labels)), most)
        if expected and len(own) >= LEAST and np.ptp(features[own], axis=0).any():
            filtered[int(label)] = found = filter_class(features[own], expected, seed)
            score[own] = found.score
    target = max(filtered, key=lambda label: filtered[label].stands_out, default=None)
    if target is not None:
        flagged[np.flatnonzero(labels == target)[filtered[target].removed]] = True
    return Findings(flagged, score, () if target is None else (target,))


if __name__ == "__main__":
    main("spectre")
