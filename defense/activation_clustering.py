"""Activation clustering: Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by
Activation Clustering", SafeAI 2019, https://arxiv.org/abs/1811.03728

Poisoned and clean samples of one class reach it by different features. So the features of each
class (by given label) are reduced to ten dimensions and split in two by k-means, and the smaller
cluster is poison where it is clearly the smaller one (Section 3.3, relative size). All samples of a
class are clustered at once.

Deviation. The paper reduces by independent component analysis; here it is principal components,
which keep their variances. So k-means splits along the directions of large variance, where the
independent ones would all count alike.

A target class that is half poison splits into equal clusters, and the rule then flags nothing, by
construction: at 10 % of all samples that is the usual case. The sizes are logged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from defense.harness.command import main
from defense.harness.defense import Detector
from defense.harness.findings import Findings
from utils.config import OpenFraction, PositiveInt

log = logging.getLogger("dataelixir")


@dataclass(frozen=True)
class ActivationClustering(Detector):
    """Activation clustering.

    Args:
        components: dimensions that each class's features are reduced to.
        size_threshold: a class's smaller cluster is flagged if it holds less than this share of the
            class.
    """

    components: PositiveInt = 10
    size_threshold: OpenFraction = 0.35

    def inspect(self, data, victim, run):
        features, labels = run.features(victim, data), data.labels.numpy()
        return self.find_poison(features, labels, run.dataset.classes)

    def find_poison(
        self, features: np.ndarray, labels: np.ndarray, names: Sequence[str] = ()
    ) -> Findings:
        """Cluster each class and flag the small clusters.

        The score is the share of the class in the other cluster.

        Args:
            features: float (N, D).
            labels: int (N,), given labels.
            names: the classes', for the log; their numbers by default.
        """
        score, targets = np.zeros(len(labels)), []
        for label in np.unique(labels):
            own = np.flatnonzero(labels == label)
            if len(own) < 2 or np.ptp(features[own], axis=0).max() == 0:
                continue
            seed = self.numpy_seed("activation_clustering", int(label))
            cluster = split(features[own], self.components, seed)
            share = cluster.mean()
            score[own] = np.where(cluster == 1, 1 - share, share)
            small = score[own].max() > 1 - self.size_threshold
            targets += [int(label)] if small else []
            sizes, mark = np.bincount(cluster, minlength=2), "  <- flagged" if small else ""
            name = names[label] if names else label
            log.info("class %s: clusters of %d and %d%s", name, *sizes, mark)
        return Findings(score > 1 - self.size_threshold, score, tuple(targets))


def split(features: np.ndarray, components: int, seed: int) -> np.ndarray:
    """The cluster, 0 or 1, of each of n >= 2 samples (n, D) of one class."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    reduced = PCA(min(components, *features.shape), svd_solver="full").fit_transform(features)
    return KMeans(2, n_init=10, random_state=seed).fit_predict(reduced)


if __name__ == "__main__":
    main("activation_clustering")
