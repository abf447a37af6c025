"""The picture of the blending attacks: drawn with comparable statistics, or from a file."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from attack.poisoning.photographs import CANVAS, clouds, grain, hills, leaves
from attack.poisoning.picture import PICTURES, cartoon, load_picture, noise
from utils.config import UserError
from utils.images import decoding

PHOTOGRAPHS = [grain, leaves, clouds, hills]


def spectrum_slope(grey):
    """Exponent at which power falls with frequency, over rings one bin wide."""
    n = len(grey)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(n) * n, np.fft.fftfreq(n) * n))
    power, rings = np.abs(np.fft.fft2(grey)) ** 2, np.arange(1, n // 2 + 1)
    mean = [power[(frequency >= ring - 0.5) & (frequency < ring + 0.5)].mean() for ring in rings]
    return np.polyfit(np.log(rings), np.log(mean), 1)[0]


def low_share(grey):
    """Share of the energy, without the mean, in the 8 x 8 lowest bins of the DCT."""
    energy = dctn(grey - grey.mean(), norm="ortho") ** 2
    return energy[:8, :8].sum() / energy.sum()


def test_the_cartoon_has_the_statistics_of_the_original():
    drawn = cartoon(32).double()
    assert ((drawn.mean((1, 2)) > 140) & (drawn.mean((1, 2)) < 210)).all()
    assert ((drawn.std((1, 2)) > 55) & (drawn.std((1, 2)) < 100)).all()
    assert -2.4 < spectrum_slope(drawn.mean(0).numpy()) < -1.4
    assert 0.35 < low_share(drawn.mean(0).numpy()) < 0.65


def test_noise_would_not_pass_for_it():
    grey = noise(32).double().mean(0).numpy()
    assert spectrum_slope(grey) > -0.5
    assert low_share(grey) < 0.2


@pytest.mark.parametrize("draw", PHOTOGRAPHS, ids=lambda draw: draw.__name__)
def test_photographs_are_neither_dark_nor_pale_and_hardly_clipped(draw):
    drawn = draw(32).double()
    assert ((drawn.mean((1, 2)) > 85) & (drawn.mean((1, 2)) < 170)).all()
    assert ((drawn.std((1, 2)) > 30) & (drawn.std((1, 2)) < 70)).all()
    assert ((drawn == 0) | (drawn == 255)).double().mean() < 0.04
    channels = np.corrcoef(drawn.flatten(1).numpy())
    assert channels.min() > 0.3  # coloured, and yet lit by one light
    assert channels.min() < 0.99


@pytest.mark.parametrize("side", [32, 64])
def test_each_photograph_has_a_spectrum_of_its_own(side):
    of = lambda draw: spectrum_slope(draw(side).double().mean(0).numpy())
    assert -1.6 < of(grain) < -0.9  # power, twice the exponent of the amplitude
    assert -2.7 < of(leaves) < -1.8  # natural images: about -2
    assert -3.4 < of(hills) < -2.7
    assert -4.4 < of(clouds) < -3.6
    assert of(grain) - 0.5 > of(leaves) > of(hills) + 0.3 > of(clouds)


@pytest.mark.parametrize("draw", PHOTOGRAPHS, ids=lambda draw: draw.__name__)
def test_a_photograph_is_one_drawing_at_every_size(draw):
    centred = lambda x: (x - x.mean((1, 2), keepdim=True)).flatten()
    small = centred(draw(16).double())
    for side in (32, 64, 224, CANVAS + 64):
        drawn = draw(side)
        assert drawn.shape == (3, side, side)
        scaled = centred(torch.nn.functional.adaptive_avg_pool2d(drawn.double(), 16))
        assert torch.corrcoef(torch.stack([scaled, small]))[0, 1] > 0.97


@pytest.mark.parametrize("draw", PICTURES.values(), ids=list(PICTURES))
def test_it_is_drawn_alike_every_time(draw):
    first = draw(32)
    torch.manual_seed(1)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 32, 32)
    assert torch.equal(draw(32), first)


def test_the_cartoon_is_one_drawing_at_every_size():
    large = cartoon(64).double()
    halved = torch.nn.functional.avg_pool2d(large, 2)
    assert (halved - cartoon(32).double()).abs().mean() < 1.5


def test_a_file_is_squashed_to_a_square_and_scaled_to_0_1(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE", tmp_path / "cache")
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = (255, 51, 0)
    Image.fromarray(pixels).save(tmp_path / "half.png")
    read = load_picture(str(tmp_path / "half.png"), 8)
    assert read.shape == (3, 8, 8)
    assert (read[:, :, :3] == 0).all()
    assert torch.allclose(
        read[:, :, 5:], torch.tensor([1.0, 0.2, 0.0])[:, None, None].expand(3, 8, 3)
    )


def test_unusable_files_are_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE", tmp_path / "cache")
    with pytest.raises(
        UserError,
        match="attack_trigger_img_path: hello.png: nothing found at .* built-in pictures: cartoon",
    ):
        load_picture("hello.png", 32)
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "."):
        with pytest.raises(
            UserError, match="attack_trigger_img_path: .*not an image that can be read"
        ):
            load_picture(str(tmp_path / name), 32)
