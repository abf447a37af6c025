"""SPECTRE on features whose truth is planted."""
import numpy as np
import pytest

from defense import spectre
from tests.test_detectors import rates, spectral_of


def hidden(poison, size=700, width=24, seed=0):
    """Classes with one direction of large variance, which poison of class 1 does not lie along: what spectral signatures miss."""
    rng = np.random.default_rng(seed)
    scale = np.r_[8.0, np.ones(width - 1)]
    labels = np.repeat(np.arange(3), size)
    features = rng.normal(size=(len(labels), width)) * scale
    shifted = rng.normal(size=(poison, width))
    shifted[:, 5] += 7
    return np.concatenate([features, shifted]), np.r_[labels, np.full(poison, 1)], np.arange(len(labels) + poison) >= len(labels)


@pytest.mark.parametrize("poison", [20, 60, 150])
def test_spectre_finds_what_lies_along_no_large_direction(poison):
    features, labels, poisoned = hidden(poison)
    found = spectre.inspect(features, labels, poisoned.mean(), seed=0)
    tpr, _ = rates(found, poisoned)
    assert found.targets == (1,) and tpr > 0.95 and found.flagged.sum() == int(1.5 * int(poisoned.mean() * len(labels)))
    assert rates(spectral_of(features, labels, poisoned.mean()), poisoned)[0] < 0.8


def test_spectre_touches_one_class_and_no_more_than_its_budget():
    features, labels, _ = hidden(0)
    found = spectre.inspect(features, labels, 0.02, seed=0)
    assert len(found.targets) == 1 and set(labels[found.flagged.numpy()]) == set(found.targets) and found.flagged.sum() == int(1.5 * int(0.02 * len(labels)))
    assert not spectre.inspect(features, labels, 0.0, seed=0).flagged.any()
    few = np.arange(len(labels)) % 100 == 0     # classes of seven: too small to be looked at
    assert spectre.inspect(features[few], labels[few], 0.1, seed=0).targets == ()


def test_quantum_scores_take_the_exponential_of_the_matrix():
    """Ports take it of every element. By hand, for a covariance of 3 and 1 with axes turned by 45 degrees: Q = diag(e^4, 1) there."""
    axes = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    turned = np.array([[np.sqrt(6), 0], [-np.sqrt(6), 0], [0, np.sqrt(2)], [0, -np.sqrt(2)]]) @ axes
    expected = np.array([6 * np.exp(4), 6 * np.exp(4), 2, 2]) / (np.exp(4) + 1)
    assert np.allclose(spectre.quantum_scores(turned), expected)
    calm = np.array([[0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5]])     # less than a unit Gaussian everywhere: plain squared norms
    assert np.allclose(spectre.quantum_scores(calm), 0.125)


def test_whitening_leaves_out_what_does_not_vary():
    rows = np.random.default_rng(0).normal(size=(400, 3)) @ np.array([[2.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    white = spectre.whiten(rows, rows.mean(0), np.cov(rows.T))
    assert white.shape == (400, 2) and np.allclose(np.cov(white.T), np.eye(2))
