"""SCAn: Tang et al., "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
USENIX Security 2021, https://arxiv.org/abs/1908.00686

Features are a class mean plus a variation that all classes share: x = mu + eps, mu ~ N(0, Su), eps ~ N(0, Se), fitted on
clean images by expectation maximisation. Under Se, each class of (received + clean) samples is split in two; the gain in
likelihood J of two groups over one is an outlier among classes where the class holds two kinds (Section 4). There the
group with fewer of the clean images is poison.

Three deviations: Se is shrunk towards a multiple of the identity (Ledoit and Wolf), so that it is regular however few
clean images there are; only classes with an unusually *large* J are flagged (a small one speaks for one group); and a class
of which one sample is received is passed over.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jsonargparse.typing import PositiveFloat

from defense.harness.baseline import (
    CleanImagesConfig,
    Findings,
    Recipe,
    drop_and_retrain,
    numpy_seed,
    victim_features,
)
from defense.harness.knowledge import CLEAN_IMAGES, clean_images
from defense.harness.result import Result
from utils.classifier.training import Observer
from utils.images.data import Dataset, LabeledImages
from utils.late import torch
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")
KNOWLEDGE = (CLEAN_IMAGES,)
ITERATIONS, TOLERANCE = 100, 1e-5
FLOOR = 1e-6  # of the features' mean variance: what does not vary within classes of clean images has no scale of its own
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Config(CleanImagesConfig):
    """SCAn.

    Args:
        scan_threshold: robust standard deviations above the median class beyond which a class is flagged (e squared).
    """

    scan_threshold: PositiveFloat = 7.389


@dataclass(frozen=True)
class Split:
    """One class in two groups.

    Attributes:
        gain: J, the mean gain in squared distance of two groups over one.
        score: float (n,), how much nearer a received sample is to the group with fewer clean images than to the other.
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
            left, centre = (
                between - gain @ between,
                gain @ mean,
            )  # posterior covariance and mean of the class's mu
            new_between += (np.outer(centre, centre) + left) / len(groups)
            new_within += ((group - centre).T @ (group - centre) + len(group) * left) / len(
                features
            )
        new_within = shrunk(new_within)
        change = max(np.abs(new_between - between).max(), np.abs(new_within - within).max())
        between, within = new_between, new_within
        if change < TOLERANCE:
            break
    return within


def split_class(received: np.ndarray, clean: np.ndarray, seed: int) -> Split:
    """Two groups of whitened features: received (n, D), and clean (c, D) of the same class, n + c >= 2."""
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


def inspect(
    received: LabeledImages,
    clean: LabeledImages,
    features: np.ndarray,
    clean_features: np.ndarray,
    config: Config,
) -> Findings:
    """Split every class, and flag the suspect group of those that stand out.

    Args:
        received, clean: N and M samples, of which labels are used.
        features: float (N, D).
        clean_features: float (M, D).
    """
    from scipy.linalg import eigh

    centre, labels, clean_labels = (
        clean_features.mean(0),
        received.labels.numpy(),
        clean.labels.numpy(),
    )
    values, vectors = eigh(shared_variation(clean_features - centre, clean_labels))
    whiten = lambda x: (x - centre) @ vectors / np.sqrt(values)
    points, clean_points = whiten(features), whiten(clean_features)
    classes = [label for label in np.unique(labels) if (labels == label).sum() > 1]
    splits = [
        split_class(
            points[labels == label],
            clean_points[clean_labels == label],
            numpy_seed(config.random_seed, "scan", int(label)),
        )
        for label in classes
    ]
    index = outlier_index(np.array([split.gain for split in splits]))
    score, flagged = np.zeros(len(labels)), np.zeros(len(labels), dtype=bool)
    for label, split, outlier in zip(classes, splits, index):
        score[labels == label] = split.score
        flagged[labels == label] = split.fewer & (outlier > config.scan_threshold)
        log.info(
            "class %d: J %.3f, outlier index %.2f%s",
            label,
            split.gain,
            outlier,
            "  <- flagged" if outlier > config.scan_threshold else "",
        )
    targets = tuple(
        int(label) for label, outlier in zip(classes, index) if outlier > config.scan_threshold
    )
    return Findings(torch.from_numpy(flagged), torch.from_numpy(score), targets)


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: Config,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Remove the group without clean images from contaminated classes, and train on the rest."""
    with record.stage("inspect"):
        clean = clean_images(dataset, config.clean_share, config.random_seed)
        found = inspect(
            data, clean, victim_features(victim, data), victim_features(victim, clean), config
        )
    return drop_and_retrain(
        found, data, victim, Recipe(config, dataset, victim.device, record, observer)
    )


if __name__ == "__main__":
    from defense.harness.run import main

    main("scan")
