"""LF: one smooth pattern for all images, within its range, that a classifier is weak against.

The classifier is planted: it reads one wave across the image, so that the search must succeed.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import nn

from attack.lf import LowFrequency
from attack.poisoning import fitting
from attack.poisoning.fitting import fit_split
from attack.poisoning.smooth_pattern import blur_matrix, fooling_rate, minmax, start
from attack.poisoning.trigger import FitContext
from tests.toys import INFO, random_images
from utils.config import TrainConfig, UserError
from utils.images.data import Dataset, LabeledImages, to_uint8
from utils.randomness import keyed_generator

SIDE, FIT_IMAGES = 32, 240
TARGETS = 0, 1


class WaveReader(nn.Module):
    """Class 0 where an image has more of one smooth wave than none, else class 1."""

    device = torch.device("cpu")

    def __init__(self, gain=2000.0):
        super().__init__()
        wave = torch.cos(4 * torch.pi * torch.arange(SIDE) / SIDE)
        self.wave, self.gain = wave[:, None] * wave, gain

    def forward(self, x):
        wave = self.gain * (x * self.wave).mean((1, 2, 3))
        return torch.stack([wave, -wave - 1e-6], dim=1)


def wave_context(target=0):
    """Noise, labelled by the reader; a pattern of the wave can push nearly all of it over."""
    images = random_images(300, 3, SIDE, SIDE) // 5 * 3 + 25
    data = LabeledImages(images, WaveReader()(images.float() / 255).argmax(1))
    config = TrainConfig(device="cpu", amp=False, batch_size=32)
    return FitContext(Dataset(data, data, ("wave", "none"), "waves", INFO), target, 2, config)


def planted(context):
    """Ready without a search, for tests/test_triggers.py: it grows lighter from left to right."""
    pattern = torch.linspace(0, 51, context.side).round().to(torch.uint8)
    return LowFrequency().with_fitted(pattern=pattern.expand(3, context.side, -1).contiguous())


@pytest.fixture
def victim(monkeypatch, tmp_path):
    """Plants the classifier that the search is made with, and keeps fits apart."""
    monkeypatch.setattr(fitting, "FITTED", tmp_path / "fitted")
    plant = lambda reader: monkeypatch.setattr(
        "attack.poisoning.smooth_pattern.surrogate", lambda *_: reader
    )
    plant(WaveReader())
    return plant


def search(target=0, **keys):
    keys = {"lf_epochs": 8, "fit_images": FIT_IMAGES} | keys
    return LowFrequency(**keys).prepare(wave_context(target)).fitted["pattern"]


def low_energy(pattern):
    """Share of the energy of (3, H, W), without channel means, in the lowest 8x8 of its DCT."""
    array = pattern.double().numpy()
    power = dctn(array - array.mean((1, 2), keepdims=True), axes=(1, 2), norm="ortho") ** 2
    return power[:, :8, :8].sum() / power.sum()


@pytest.mark.parametrize(("amplitude", "most"), [(0.2, 51), (0.4, 102)])
def test_the_pattern_spans_its_range_and_is_smooth(victim, amplitude, most):
    pattern = search(lf_amplitude=amplitude)
    assert pattern.dtype == torch.uint8
    assert (pattern.min(), pattern.max()) == (0, most)
    assert low_energy(pattern) > 0.95
    assert low_energy(random_images(3, SIDE, SIDE)) < 0.1


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_pattern_is_added_to_every_image_and_clipped(split):
    trigger, images = planted(wave_context()), random_images(50, 3, 32, 32)
    expected = (images.int() + trigger.fitted["pattern"].int()).clamp(max=255)
    assert torch.equal(trigger.apply(images, torch.arange(50), split).int(), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_it_fools_the_classifier_far_more_than_chance_patterns_do(victim, target):
    pattern, model = search(target), WaveReader()
    data = fit_split(wave_context(), FIT_IMAGES)[1]
    others = data.images[data.labels != target]
    generator, blur = torch.Generator().manual_seed(0), blur_matrix(SIDE, 6.0)
    drawn = [torch.randn(3, SIDE, SIDE, generator=generator) for _ in range(9)]
    chance = [fooling_rate(model, others, to_uint8(0.2 * minmax(blur @ u @ blur.T))) for u in drawn]
    assert fooling_rate(model, others, pattern) > 0.6
    assert np.median(chance) < 0.3
    assert fooling_rate(model, others, torch.zeros_like(pattern)) == 0


def test_searching_again_gives_the_same_pattern_and_another_target_another(
    victim, monkeypatch, tmp_path
):
    patterns = []
    for run, target in enumerate((0, 0, 1)):
        monkeypatch.setattr(fitting, "FITTED", tmp_path / str(run))
        torch.manual_seed(run)  # what others draw changes nothing
        patterns.append(search(target, lf_epochs=1, lf_min_fooling=0.0))
    assert torch.equal(patterns[0], patterns[1])
    assert not torch.equal(patterns[0], patterns[2])


def test_a_pattern_that_fools_nobody_is_refused_with_the_figure_and_not_kept(victim):
    victim(WaveReader(gain=0.0))
    words = (
        r"lf: .*0\.000 of \d+ held-out images change class, at least 0.2 should.*; raise lf_epochs"
    )
    with pytest.raises(UserError, match=words):
        search()
    assert not list(fitting.FITTED.iterdir())


def test_without_a_search_the_pattern_is_drawn_and_nobody_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(fitting, "FITTED", tmp_path / "fitted")
    monkeypatch.delattr("attack.poisoning.smooth_pattern.surrogate")
    first, again, third = (search(lf_epochs=0, lf_pattern=n) for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, third)
    assert (first.min(), first.max()) == (0, 51)
    assert low_energy(first) > 0.95
    assert not fitting.FITTED.exists()
    assert LowFrequency(lf_epochs=0).images_fitted_on == 0
    assert LowFrequency(fit_images=7).images_fitted_on == 7


def test_the_pattern_is_chosen_apart_from_the_seed_and_by_default_with_it():
    drawn = lambda seed, **keys: start(LowFrequency(**keys), replace(wave_context(), seed=seed))
    assert torch.equal(drawn(2, lf_pattern=5), drawn(3, lf_pattern=5))
    assert torch.equal(drawn(2), drawn(3, lf_pattern=2))
    of_old = torch.randn((3, SIDE, SIDE), generator=keyed_generator(2, "lf"))
    assert torch.equal(drawn(2), of_old)


def test_blurring_is_gaussian_and_fades_at_the_border():
    blur = blur_matrix(32, 6.0)
    assert torch.equal(blur, blur.T)
    assert torch.allclose(blur[10, 16], torch.tensor(-0.5).exp())
    rows = blur.sum(1)
    assert rows[0] < 0.6 * rows[16]
    assert torch.allclose(blur_matrix(16, 6.0), blur[::2, ::2])
