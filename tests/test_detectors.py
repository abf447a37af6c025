"""Detectors on features and images whose truth is planted: what they find, what they leave alone, and known defects of other ports."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from defense import activation_clustering, scan, spectral, strip
from tests.toys import INFO
from utils.config import UserError
from utils.data import LabeledImages, to_unit
from utils.networks import Classifier

CLASSES, EACH, WIDTH = 6, 120, 24
AC, SCAN, STRIP = activation_clustering.Config(random_seed=3), scan.Config(random_seed=3), strip.Config(device="cpu", amp=False, random_seed=3)


def planted(target=2, poison=30, shift=6.0, seed=0, offset=0.0):
    """Gaussian features (N, D) around class means, labels (N,), and which samples are poison: shifted, and given the target's label."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), EACH)
    features = rng.normal(size=(CLASSES, WIDTH))[labels] * 3 + rng.normal(size=(len(labels), WIDTH))
    extra = features[:WIDTH].mean(0) + rng.normal(size=(poison, WIDTH)) + shift * rng.normal(size=WIDTH) / np.sqrt(WIDTH) * 3
    order = rng.permutation(len(labels) + poison)
    poisoned = (np.arange(len(order)) >= len(labels))[order]
    return np.concatenate([features, extra])[order] + offset, np.concatenate([labels, np.full(poison, target)])[order], poisoned


def rates(found, poisoned):
    """(TPR, FPR) of findings."""
    flagged = found.flagged.numpy()
    return flagged[poisoned].mean() if poisoned.any() else None, flagged[~poisoned].mean()


def spectral_of(features, labels, poison_rate=None):
    return spectral.inspect(features, labels, poison_rate, class_share=0.15)


def cluster(features, labels):
    return activation_clustering.inspect(features, labels, AC)


def received(labels):
    return LabeledImages(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), torch.from_numpy(labels))


def scanned(features, labels, per_class=20, config=SCAN, seed=0):
    """SCAn with `per_class` clean samples of the classes that `planted` with the same seed has."""
    clean_labels = np.repeat(np.arange(CLASSES), per_class)
    means = np.random.default_rng(seed).normal(size=(CLASSES, WIDTH)) * 3
    clean = means[clean_labels] + np.random.default_rng(seed + 100).normal(size=(len(clean_labels), WIDTH))
    return scan.inspect(received(labels), received(clean_labels), features, clean, config)


# spectral signatures

@pytest.mark.parametrize("target", [0, 2, 5])
def test_spectral_signatures_find_poison_in_a_class_that_nobody_named(target):
    features, labels, poisoned = planted(target)
    found = spectral_of(features, labels, poisoned.mean())
    assert rates(found, poisoned)[0] == 1
    removed = np.bincount(labels[found.flagged.numpy()], minlength=CLASSES)
    assert removed.tolist() == [45] * CLASSES    # 1.5 times 30, from every class


def test_spectral_budgets_are_what_they_say():
    features, labels, poisoned = planted(poison=100)
    sizes = np.bincount(labels)
    at_rate = np.bincount(labels[spectral_of(features, labels, poisoned.mean()).flagged.numpy()])
    assert at_rate.tolist() == [min(int(1.5 * poisoned.mean() * len(labels)), n // 2) for n in sizes] and at_rate[0] == 60
    shared = np.bincount(labels[spectral_of(features, labels).flagged.numpy()])
    assert shared.tolist() == [int(0.15 * n) for n in sizes]    # also of a clean set: that is the stated loss
    assert not spectral_of(features, labels, 0.0).flagged.any()


def test_spectral_scores_are_of_centred_features_and_squared():
    """A port that scores |v.f| of features that are not centred follows the class mean instead."""
    features, labels, poisoned = planted()
    moved = spectral_of(features + 1000.0, labels, poisoned.mean())
    assert torch.equal(moved.flagged, spectral_of(features, labels, poisoned.mean()).flagged)
    by_hand = spectral.spectral_scores(np.array([[0.0, 1], [4, 1], [0, 1], [4, 1], [2, 1.5]]))
    assert by_hand == pytest.approx([4, 4, 4, 4, 0], abs=1e-9)


def test_without_a_rate_the_declared_knowledge_is_empty():
    assert spectral.Config().knowledge == ("poison rate",) and spectral.Config(budget="share").knowledge == ()


# activation clustering

@pytest.mark.parametrize("target", [0, 4])
def test_activation_clustering_finds_a_small_cluster_and_leaves_clean_classes_alone(target):
    features, labels, poisoned = planted(target)
    found = cluster(features, labels)
    assert rates(found, poisoned) == (1, 0) and found.targets == (target,)


def test_activation_clustering_leaves_a_clean_set_alone():
    found = cluster(*planted(poison=0)[:2])
    assert not found.flagged.any() and found.targets == ()


def test_a_target_class_that_is_half_poison_is_not_flagged_by_construction():
    features, labels, poisoned = planted(poison=EACH)
    found = cluster(features, labels)
    assert not found.flagged.any()
    own = labels == 2
    assert len(np.unique(found.score.numpy()[own])) <= 2 and found.score.numpy()[own] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("inspect", [cluster, spectral_of, scanned])
def test_findings_belong_to_samples_and_not_to_places_in_a_loader(inspect):
    """A port that shuffles, or clusters batches apart, loses which sample is which."""
    features, labels, poisoned = planted()
    order = np.random.default_rng(7).permutation(len(labels))
    assert np.array_equal(inspect(features[order], labels[order]).flagged.numpy(), inspect(features, labels).flagged.numpy()[order])


def test_classes_that_cannot_be_split_are_passed_over():
    features, labels, _ = planted(poison=0)
    features, labels = np.concatenate([features, np.ones((5, WIDTH))]), np.concatenate([labels, [6, 7, 7, 7, 7]])
    found = cluster(features, labels)
    assert not found.flagged.any() and not found.score[-5:].any()


# SCAn

@pytest.mark.parametrize("poison", [12, 30, 200])
def test_scan_finds_the_group_without_clean_images_even_where_it_is_the_larger_one(poison):
    features, labels, poisoned = planted(poison=poison)
    found = scanned(features, labels)
    assert found.targets == (2,) and rates(found, poisoned) == (1, 0)


def test_scan_leaves_a_clean_set_alone():
    found = scanned(*planted(poison=0)[:2])
    assert not found.flagged.any() and found.targets == ()


def test_scan_works_with_fewer_clean_images_than_features():
    """A pseudo-inverse would hide that the covariance of 18 samples in 24 dimensions is singular."""
    features, labels, poisoned = planted()
    found = scanned(features, labels, per_class=3)
    assert found.targets == (2,) and rates(found, poisoned) == (1, 0) and np.isfinite(found.score.numpy()).all()


def test_the_shared_variation_is_recovered():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(5, 5)) / 2 + np.eye(5)
    labels = np.repeat(np.arange(40), 50)
    features = (rng.normal(size=(40, 5)) * 2)[labels] + rng.normal(size=(len(labels), 5)) @ mix.T
    within = scan.shared_variation(features - features.mean(0), labels)
    assert np.abs(within - mix @ mix.T).max() < 0.12 * np.trace(mix @ mix.T) / 5


def test_the_shared_variation_is_recovered_from_two_samples_a_class():
    """Without the posterior covariance of the class means, half of the variation would be taken for theirs."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(600), 2)
    features = (rng.normal(size=(600, 4)) * 0.7)[labels] + rng.normal(size=(len(labels), 4))
    within = scan.shared_variation(features - features.mean(0), labels)
    assert np.diag(within) == pytest.approx(1, abs=0.12)


def test_the_gain_is_that_of_two_groups_over_one():
    points = np.array([[0.0, 0], [0, 2], [10, 0], [10, 2]])
    split = scan.split_class(points, np.array([[0.0, 1], [0, 1]]), seed=0)
    total = np.concatenate([points, [[0, 1], [0, 1]]])
    assert split.gain == pytest.approx((((total - total.mean(0)) ** 2).sum() - 4) / 6) and split.fewer.tolist() == [False, False, True, True]
    assert split.score == pytest.approx([1 - 101, 1 - 101, 101 - 1, 101 - 1])


def test_only_unusually_large_gains_are_outliers():
    index = scan.outlier_index(np.array([1.0, 1.1, 0.9, 1.0, 9.0, -9.0]))
    assert index[4] > 7.4 and index[5] < -7.4 and np.abs(index[:4]).max() < 2


# STRIP

class Holding(nn.Module):
    """Reads the mean level as one of 8 classes, softly; a bright corner holds class 0 under any overlay."""

    device = torch.device("cpu")

    def forward(self, x):
        level, corner = x.mean(dim=(1, 2, 3)), x[:, 0, 0, 0] - x[:, 0, 2, 2]
        logits = -40 * (level[:, None] - torch.linspace(-0.5, 1.5, 8)).abs()
        logits[:, 0] += 40.0 * (corner > 0.7)
        return logits


def strip_images(n, seed, triggered=0):
    images = torch.randint(30, 120, (n, 1, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).expand(-1, 3, 4, 4).clone()
    images[:triggered, :, 0, 0] = 255
    images[:triggered, :, 2, 2] = 0
    return images


@pytest.mark.parametrize("mode", ["add", "mix"])
def test_strip_finds_triggers_that_hold_and_loses_its_stated_share(mode):
    config = replace(STRIP, overlay_mode=mode, overlays=40)
    images = strip_images(400, seed=1, triggered=50 if mode == "add" else 0)
    found = strip.inspect(images, strip_images(300, seed=2), Holding(), torch.full((3,), 0.5), config)
    if mode == "add":
        assert found.flagged[:50].all()
    assert 0.04 < found.flagged[50:].double().mean() < 0.17    # 0.1 from 260 images: four standard deviations


def test_strip_with_another_share_loses_that():
    images, clean = strip_images(600, seed=1), strip_images(900, seed=2)
    lost = [strip.inspect(images, clean, Holding(), torch.full((3,), 0.5), replace(STRIP, false_alarms=share)).flagged.double().mean() for share in (0.02, 0.5)]
    assert lost[0] < 0.06 and 0.4 < lost[1] < 0.6


def test_overlays_are_added_to_normalised_images():
    torch.manual_seed(0)
    victim = Classifier(nn.Sequential(nn.Flatten()), 48, 5, INFO).eval()
    images, overlays = (torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8) for n in (3, 2))
    normal = lambda x: (to_unit(x) - 0.5) / 0.25
    expected = [torch.stack([torch.distributions.Categorical(logits=victim.head((normal(x) + normal(o)).flatten())).entropy() for o in overlays]).mean()
                for x in images]
    measured = strip.mean_entropies(victim, images, overlays, torch.tensor(INFO.mean), STRIP)
    assert measured.tolist() == pytest.approx([e.item() for e in expected], abs=1e-5)
    alone = strip.mean_entropies(victim, images, overlays, torch.tensor(INFO.mean), replace(STRIP, overlay_mode="mix"))
    assert alone[0].item() != pytest.approx(measured[0].item(), abs=1e-3)


def test_strip_needs_two_clean_images():
    with pytest.raises(UserError, match="clean_share"):
        strip.inspect(strip_images(5, 0), strip_images(1, 1), Holding(), torch.zeros(3), STRIP)
