"""SIG: one sinusoid over the columns, and values that stop at 0 and 255."""

import math

import pytest
import torch

from attack.poisoning.config import PoisonConfig
from attack.poisoning.labels import label_map
from attack.poisoning.poison import poison_training_set
from attack.sig import Sig
from tests.toys import CLASSES, random_images
from utils.images.data import LabeledImages

GREY = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)


def stamped(x, split="train", **keys):
    return Sig(**keys).apply(x, torch.arange(len(x)), split).int()


def test_every_row_and_channel_has_the_same_six_periods():
    out = stamped(GREY)
    assert (out == out[:1, :1, :1]).all()
    wave = out[0, 0, 0] - 128
    assert wave[:16].tolist() == [
        0,
        37,
        28,
        -15,
        -40,
        -15,
        28,
        37,
        0,
        -37,
        -28,
        15,
        40,
        15,
        -28,
        -37,
    ]
    assert torch.equal(wave[:16], wave[16:])
    power = torch.fft.rfft(wave.double()).abs() ** 2
    assert power[6] / power.sum() > 0.999


def test_the_amplitude_is_reached_on_both_sides():
    wave = stamped(GREY, sig_f=8.0)[0, 0, 0] - 128
    assert wave[:4].tolist() == [0, 40, 0, -40]


def test_it_is_rounded_and_stops_at_the_ends():
    x = random_images(50, 3, 32, 32)
    wave = 40 * torch.sin(2 * math.pi * 6 / 32 * torch.arange(32, dtype=torch.float64))
    assert ((stamped(x) - (x + wave).clamp(0, 255)).abs() <= 0.5001).all()
    for level in (0, 255):
        out = stamped(torch.full_like(GREY, level))
        assert (out - level).abs().max() == 40  # a wrap would give more than 200


@pytest.mark.parametrize(("split", "delta"), [("train", 20.0), ("test", 60.0)])
def test_strengths_of_train_and_test_are_their_own(split, delta):
    assert (stamped(GREY, split, delta_train=20.0, delta_test=60.0) - 128).min() == -delta


def test_other_widths_have_as_many_periods():
    wave = stamped(torch.full((1, 3, 48, 48), 128, dtype=torch.uint8))[0, 0, 0].double() - 128
    assert torch.fft.rfft(wave).abs().argmax() == 6


def test_rows_is_the_same_wave_lying_down():
    x = random_images(5, 3, 32, 32)
    lying = stamped(x, sig_axis="rows")
    assert torch.equal(lying, stamped(x.transpose(2, 3)).transpose(2, 3))
    assert not torch.equal(lying, stamped(x))


def test_no_label_changes_and_only_the_target_class_is_touched():
    train = LabeledImages(random_images(50, 3, 32, 32), torch.arange(50) % CLASSES)
    config = PoisonConfig(attack_target=2, rate_of="target_class", pratio=0.5)
    found = poison_training_set(train, Sig(), label_map(Sig, config, CLASSES), config, 0)
    assert torch.equal(found.data.labels, train.labels)
    assert found.poison_indicator.sum() == 5
    assert (train.labels[found.poison_indicator] == 2).all()
