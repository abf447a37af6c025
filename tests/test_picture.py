"""The picture of the blending attacks: drawn with comparable statistics, or from a file."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from attack.poisoning.picture import cartoon, load_picture, noise
from utils.config import UserError
from utils.images import decoding


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


@pytest.mark.parametrize("draw", [cartoon, noise])
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
