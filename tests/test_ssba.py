"""SSBA: the secret is read back from uint8 images, the images stay good, and the residual belongs to its image."""

import pytest
import torch
import torch.nn.functional as F

from attack.poisoning import fitting
from attack.poisoning.networks import Encoder
from attack.poisoning.trigger import FitContext
from attack.ssba import SampleSpecific, psnr, ssim
from tests.test_triggers import RECIPE, TARGET, digits, ready
from tests.toys import random_images
from utils.config import UserError
from utils.images.data import to_unit

SMALL = {
    "ssba_bits": 6,
    "ssba_width": 4,
    "ssba_epochs": 8,
    "ssba_warmup": 3,
    "ssba_lr": 0.004,
    "fit_images": 500,
}
IMAGES = slice(0, 120)


def stamped(split="test", grey=False):
    """Test images and what becomes of them; with `grey` mid-tones alone, where nothing is clipped."""
    images = digits().test.images[IMAGES]
    images = images // 2 + 64 if grey else images
    return images, ready(SampleSpecific).apply(images, torch.arange(len(images)), split)


def share_read(images):
    """Share of the secret's bits that the decoder reads from images."""
    trigger = ready(SampleSpecific)
    return trigger.read(images).eq(trigger.fitted["secret"]).double().mean().item()


def correlation(images, changed):
    """Mean correlation of the residuals of two different images."""
    residuals = (changed.double() - images.double()).flatten(1)
    residuals = F.normalize(residuals - residuals.mean(1, keepdim=True))
    products = residuals @ residuals.T
    return products[~torch.eye(len(images), dtype=torch.bool)].mean().item()


def test_the_secret_is_read_from_rounded_images_and_not_from_clean_ones():
    images, hidden = stamped()
    assert share_read(hidden) >= 0.99
    assert share_read(images) < 0.85


def test_images_stay_good():
    images, hidden = stamped()
    assert psnr(images, hidden) >= 28
    assert (hidden.int() - images.int()).abs().max() <= round(0.12 * 255)


def test_residuals_are_sample_specific():
    """Of mid-tones, since clipping at black and white would make any residual look so."""
    assert correlation(*stamped(grey=True)) < 0.9


def test_the_same_secret_in_training_and_test_images():
    images, hidden = stamped("test")
    assert torch.equal(stamped("train")[1], hidden)
    assert set(ready(SampleSpecific).fitted["secret"].tolist()) <= {0.0, 1.0}
    assert not torch.equal(
        ready(SampleSpecific).apply(images.flip(3), torch.arange(len(images))), hidden.flip(3)
    )


def test_the_seed_draws_the_secret():
    draw = lambda seed: SampleSpecific()._random_bits(1, seed, "ssba", "secret")[0].tolist()
    assert draw(2) == draw(2) != draw(3)
    assert len(draw(2)) == 20


def test_the_encoder_reads_image_and_bits_within_its_bound():
    torch.manual_seed(0)
    encoder = Encoder(32, 6, 4, 0.12)
    x, bits = to_unit(random_images(2, 3, 32, 32)), torch.tensor([[0.0, 1, 0, 1, 1, 0]] * 2)
    with torch.no_grad():
        residual, other = encoder(x, bits), encoder(x, 1 - bits)
        encoder.last.bias.add_(100)
        assert encoder(x, bits).max() <= 0.12
    assert residual.shape == x.shape
    assert not torch.allclose(residual, other)
    assert not torch.allclose(residual[0], residual[1])


def test_ssim_and_psnr_by_hand():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(x, 1 - x) < 0 < ssim(x, x * 0.8) < 0.99
    grey = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    assert psnr(grey, grey + 1) == pytest.approx(48.13, abs=0.01)
    assert psnr(grey, grey) == pytest.approx(98.13, abs=0.01)


def test_an_encoder_that_learned_too_little_is_refused_with_the_figures_and_not_kept():
    before = set(fitting.FITTED.glob("ssba-*"))
    with pytest.raises(
        UserError,
        match=r"ssba: .*0\.\d+ of the bits are read.*at least 0.99 should be; PSNR \d+\.\d dB.*; raise ssba_epochs",
    ):
        SampleSpecific(**SMALL | {"ssba_epochs": 1, "fit_images": 50}).prepare(
            FitContext(digits(), TARGET, 2, RECIPE)
        )
    assert set(fitting.FITTED.glob("ssba-*")) == before


class Collapsed(SampleSpecific):
    """What a one-bit encoder likes to become: one pattern for all images, which a decoder reads well."""

    kind = "constant"

    def residual(self, x):
        pattern = 0.02 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        own = 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x)))
        return pattern.expand_as(x) if self.kind == "constant" else own

    def read(self, images):
        return torch.ones(len(images), 1)


def test_an_encoder_that_collapsed_to_one_pattern_is_refused():
    grey = torch.full((40, 3, 8, 8), 128, dtype=torch.uint8)
    ready_made = lambda kind: type("Drawn", (Collapsed,), {"kind": kind})().with_fitted(
        secret=torch.ones(1)
    )
    ready_made("own")._check(grey)
    with pytest.raises(
        UserError, match=r"residuals of different images correlate 1\.00, below 0\.9 needed"
    ):
        ready_made("constant")._check(grey)
