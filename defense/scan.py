"""SCAn: Tang et al., "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
Contamination Detection", USENIX Security 2021, https://arxiv.org/abs/1908.00686

Features are a class mean plus a variation that all classes share: x = mu + eps, mu ~ N(0, Su), eps
~ N(0, Se), fitted on clean images by expectation maximisation. Under Se, each class of (received +
clean) samples is split in two; the gain in likelihood J of two groups over one is an outlier among
classes where the class holds two kinds (Section 4). There the group with fewer of the clean images
is poison.

Three deviations: Se is shrunk towards a multiple of the identity (Ledoit and Wolf), so that it is
regular however few clean images there are; only classes with an unusually *large* J are flagged (a
small one speaks for one group); and a class of which one sample is received is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from defense.harness.command import main
from defense.harness.defense import Detector, ToldCleanImages
from defense.harness.findings import Findings
from defense.harness.knowledge import clean_images
from utils.config import PositiveFloat

log = logging.getLogger("dataelixir")
ITERATIONS, TOLERANCE = 100, 1e-5
# of the features' mean variance: what does not vary within classes of clean images has no scale of
# its own
FLOOR = 1e-6
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Labeled:
    """Features float (N, D) and labels int (N,) of some samples."""

    features: np.ndarray
    labels: np.ndarray

    def of(self, label: int) -> np.ndarray:
        """Features (n, D) of one class."""
        return self.features[self.labels == label]


@dataclass(frozen=True)
class Scan(ToldCleanImages, Detector):
    """SCAn.

    Args:
        scan_threshold: robust standard deviations above the median class beyond which a class is
            flagged (e squared).
    """

    scan_threshold: PositiveFloat = 7.389

    def inspect(self, data, victim, run):
        clean = clean_images(run.dataset, self.clean_share, self.random_seed)
        of = lambda part: Labeled(run.features(victim, part), part.labels.numpy())
        return self.find_poison(of(data), of(clean), run.dataset.classes)

    def find_poison(self, received: Labeled, clean: Labeled, names: Sequence[str] = ()) -> Findings:
        """Split every class, and flag the suspect group of those that stand out.

        `names` are the classes', for the log; their numbers by default.
        """
        from scipy.linalg import eigh

        centre, labels = clean.features.mean(0), received.labels
        values, vectors = eigh(shared_variation(clean.features - centre, clean.labels))
        whiten = lambda x: (x - centre) @ vectors / np.sqrt(values)
        points = Labeled(whiten(received.features), labels)
        clean_points = Labeled(whiten(clean.features), clean.labels)
        classes = [int(label) for label in np.unique(labels) if (labels == label).sum() > 1]
        seed = lambda label: self.numpy_seed("scan", label)
        splits = [split_class(points.of(c), clean_points.of(c), seed(c)) for c in classes]
        index = outlier_index(np.array([split.gain for split in splits]))
        score, flagged = np.zeros(len(labels)), np.zeros(len(labels), dtype=bool)
        targets = []
        for label, split, outlier in zip(classes, splits, index):
            out = outlier > self.scan_threshold
            score[labels == label], flagged[labels == label] = split.score, split.fewer & out
            targets += [label] if out else []
            mark = "  <- flagged" if out else ""
            name, told = names[label] if names else label, "class %s: J %.3f, outlier index %.2f%s"
            log.info(told, name, split.gain, outlier, mark)
        return Findings(flagged, score, tuple(targets))


@dataclass(frozen=True)
class Split:
    """One class in two groups.

    Attributes:
        gain: J, the mean gain in squared distance of two groups over one.
        score: float (n,), how much nearer a received sample is to the group with fewer clean images
            than to the other.
        fewer: bool (n,), received samples in the group with fewer clean images.
    """

    gain: float
    score: np.ndarray
    fewer: np.ndarray


def shared_variation(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Se (D, D) of x = mu + eps, by expectation maximisation over classes, shrunk to be regular.

    Args:
        features: float (M, D) of clean images, centred.
        labels: int (M,).
    """
    from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance

    groups = [features[labels == label] for label in np.unique(labels)]
    means = np.stack([group.mean(0) for group in groups])
    residuals = np.concatenate([group - mean for group, mean in zip(groups, means)])
    floor = (FLOOR * features.var(0).mean() + 1e-12) * np.eye(features.shape[1])
    shrinkage = ledoit_wolf_shrinkage(residuals, assume_centered=True) if residuals.any() else 1.0
    shrunk = lambda covariance: shrunk_covariance(covariance, shrinkage) + floor
    between, within = means.T @ means / len(means), shrunk(residuals.T @ residuals / len(residuals))
    for _ in range(ITERATIONS):
        new_between, new_within = np.zeros_like(between), np.zeros_like(within)
        for group, mean in zip(groups, means):
            gain = np.linalg.solve(between + within / len(group), between).T
            # Posterior covariance and mean of the class's mu.
            left, centre = between - gain @ between, gain @ mean
            new_between += (np.outer(centre, centre) + left) / len(groups)
            spread = (group - centre).T @ (group - centre)
            new_within += (spread + len(group) * left) / len(features)
        new_within = shrunk(new_within)
        change = max(np.abs(new_between - between).max(), np.abs(new_within - within).max())
        between, within = new_between, new_within
        if change < TOLERANCE:
            break
    return within


def split_class(received: np.ndarray, clean: np.ndarray, seed: int) -> Split:
    """Two groups of one class's whitened features: received (n, D), clean (c, D), n + c >= 2."""
    from sklearn.cluster import KMeans

    points = np.concatenate([received, clean])
    groups = KMeans(2, n_init=10, random_state=seed).fit(points)
    gain = (((points - points.mean(0)) ** 2).sum() - groups.inertia_) / len(points)
    group, in_clean = groups.labels_, np.bincount(groups.labels_[len(received) :], minlength=2)
    size = np.bincount(group, minlength=2)
    suspect = min((0, 1), key=lambda g: (in_clean[g], size[g]))
    distance = groups.transform(received) ** 2
    return Split(
        gain, distance[:, 1 - suspect] - distance[:, suspect], group[: len(received)] == suspect
    )


def outlier_index(gains: np.ndarray) -> np.ndarray:
    """Robust standard deviations (K,) above the median class."""
    deviation = gains - np.median(gains)
    return deviation / (MAD_TO_SIGMA * np.median(np.abs(deviation)) + 1e-12)


if __name__ == "__main__":
    main("scan")
