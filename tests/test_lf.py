"""LF: one smooth pattern for all images, within its range, that a clean classifier is weak against."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from attack.lf import LowFrequency, blur_matrix, fooling_rate, minmax
from attack.poisoning import fitting
from attack.poisoning.fitting import fit_split, surrogate
from attack.poisoning.progress import Progress
from attack.poisoning.trigger import FitContext
from tests.test_triggers import RECIPE, TARGET, digits, ready
from tests.toys import random_images
from utils.config import UserError
from utils.images.data import to_uint8

SMALL = {
    "lf_amplitude": 0.4,
    "lf_epochs": 6,
    "surrogate_epochs": 16,
    "fit_images": 600,
}  # strong, so that no seed and no processor makes a pattern that is refused


def context():
    return FitContext(digits(), TARGET, 2, RECIPE)


def low_energy(pattern):
    """Share of the energy of a pattern (3, H, W), channel means removed, that lies in the lowest 4x4 of its DCT."""
    array = pattern.double().numpy()
    power = dctn(array - array.mean((1, 2), keepdims=True), axes=(1, 2), norm="ortho") ** 2
    return power[:, :4, :4].sum() / power.sum()


def held_out():
    data = fit_split(context(), 600)[1]
    return data.images[data.labels != TARGET]


def test_the_pattern_spans_its_range_and_is_smooth():
    pattern = ready(LowFrequency).fitted["pattern"]
    assert pattern.dtype == torch.uint8
    assert (pattern.min(), pattern.max()) == (0, 102)
    assert low_energy(pattern) > 0.9 > low_energy(random_images(3, 32, 32))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_pattern_is_added_to_every_image_and_clipped(split):
    pattern, images = ready(LowFrequency).fitted["pattern"].int(), random_images(50, 3, 32, 32)
    expected = (images.int() + pattern).clamp(max=255)
    assert torch.equal(ready(LowFrequency).apply(images, torch.arange(50), split).int(), expected)


def test_it_fools_a_clean_classifier_more_than_chance_patterns_do():
    model, pattern = surrogate(context(), 600, 16), ready(LowFrequency).fitted["pattern"]
    generator, blur = torch.Generator().manual_seed(0), blur_matrix(32, 6.0)
    random = [
        to_uint8(0.4 * minmax(blur @ torch.randn(3, 32, 32, generator=generator) @ blur.T))
        for _ in range(5)
    ]
    rates = [fooling_rate(model, held_out(), other) for other in random]
    assert fooling_rate(model, held_out(), pattern) >= max(0.2, float(np.median(rates)) + 0.05)
    assert fooling_rate(model, held_out(), torch.zeros_like(pattern)) == 0


def test_fitting_again_gives_the_same_pattern_and_another_target_another(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "attack.lf.cached",
        lambda name, context, keys, make: make(Progress(tmp_path / str(len(patterns)))),
    )
    patterns = []
    for target in (TARGET, TARGET, 8):
        torch.manual_seed(len(patterns))  # what others draw changes nothing
        trigger = LowFrequency(**SMALL | {"lf_epochs": 1, "lf_min_fooling": 0.0}).prepare(
            FitContext(digits(), target, 2, RECIPE)
        )
        patterns.append(trigger.fitted["pattern"])
    assert torch.equal(patterns[0], patterns[1])
    assert not torch.equal(patterns[0], patterns[2])


def test_a_pattern_that_fools_nobody_is_refused_with_the_figure_and_not_kept():
    before = set(fitting.FITTED.glob("lf-*"))
    with pytest.raises(
        UserError,
        match=r"lf: .*0\.\d+ of \d+ held-out images change class, at least 0.99 should.*; raise lf_epochs or lf_amplitude",
    ):
        LowFrequency(**SMALL | {"lf_min_fooling": 0.99, "lf_epochs": 1}).prepare(context())
    assert set(fitting.FITTED.glob("lf-*")) == before


def test_blurring_is_gaussian_and_fades_at_the_border():
    blur = blur_matrix(32, 6.0)
    assert torch.equal(blur, blur.T)
    assert torch.allclose(blur[10, 16], torch.tensor(-0.5).exp())
    rows = blur.sum(1)
    assert rows[0] < 0.6 * rows[16]
    assert torch.allclose(blur_matrix(16, 6.0), blur[::2, ::2])
