"""Blended: the picture can be read back from what it was blended with, and nothing got darker."""

import pytest
import torch

from attack.blended import Blended
from attack.poisoning.picture import cartoon
from tests.toys import fit_context, random_images

T = cartoon(32).double()


def stamped(x, split="train", **keys):
    return Blended(**keys).prepare(fit_context(32)).apply(x, torch.arange(len(x)), split).double()


def test_black_and_white_images():
    black = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(stamped(black), (0.2 * T).round().expand(2, -1, -1, -1))
    assert torch.equal(stamped(black + 255), (204 + 0.2 * T).round().expand(2, -1, -1, -1))


@pytest.mark.parametrize(("split", "alpha"), [("train", 0.1), ("test", 0.3)])
def test_strengths_of_train_and_test_are_their_own(split, alpha):
    x = random_images(50, 3, 32, 32)
    exact = (1 - alpha) * x + alpha * T
    out = stamped(x, split, alpha_train=0.1, alpha_test=0.3)
    assert (out - exact).abs().max() <= 0.5001
    assert (
        (out - (1 - alpha) * x) / alpha - T
    ).abs().max() <= 0.5001 / alpha  # the picture, read back


def test_rounding_makes_nothing_darker():
    x = random_images(200, 3, 32, 32)
    assert abs((stamped(x) - (0.8 * x + 0.2 * T)).mean()) < 0.05  # truncation gives -0.5


def test_the_ends_of_the_strength():
    x = random_images(3, 3, 32, 32)
    assert torch.equal(stamped(x, alpha_train=0.0), x.double())
    assert torch.equal(stamped(x, alpha_train=1.0), T.expand(3, -1, -1, -1))


def test_the_picture_is_the_one_asked_for():
    x = random_images(3, 3, 32, 32)
    assert not torch.equal(stamped(x, attack_trigger_img_path="noise"), stamped(x))
