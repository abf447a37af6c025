"""BppAttack: eight levels per channel, and cover samples with another image's residual."""

import numpy as np
import pytest
import torch

from attack.bpp import Bpp, dither, quantise
from attack.poisoning.config import PoisonConfig
from attack.poisoning.labels import label_map
from attack.poisoning.poison import Role, poison_training_set
from tests.toys import CLASSES, fit_context, random_images
from utils.config import UserError
from utils.images.data import LabeledImages

LEVELS = [round(255 * i / 7) for i in range(8)]


def ready(**keys):
    return Bpp(**keys).prepare(fit_context(16))


def stamped(x, **keys):
    return ready(**keys).apply(x, torch.arange(len(x)), "train")


def reference_dither(channel, levels):
    """Floyd-Steinberg on one channel, value by value."""
    work = channel.astype(np.float64).copy()
    height, width = work.shape
    for row in range(height):
        for column in range(width):
            old = work[row, column]
            work[row, column] = np.round(old * (levels - 1)) / (levels - 1)
            error = old - work[row, column]
            if column + 1 < width:
                work[row, column + 1] += error * 7 / 16
            if row + 1 < height and column > 0:
                work[row + 1, column - 1] += error * 3 / 16
            if row + 1 < height:
                work[row + 1, column] += error * 5 / 16
            if row + 1 < height and column + 1 < width:
                work[row + 1, column + 1] += error * 1 / 16
    return work.clip(0, 1)


def test_every_level_goes_to_the_nearest_of_eight():
    every = (
        torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    )
    out = stamped(every)
    assert out.unique().tolist() == LEVELS == [0, 36, 73, 109, 146, 182, 219, 255]
    nearest = [min(LEVELS, key=lambda level: abs(level * 1.0 - value)) for value in range(256)]
    assert ((out[0, 0].flatten() - torch.tensor(nearest)).abs() <= 37).all()
    assert (out[0, 0].flatten() == torch.tensor(nearest)).double().mean() > 0.98
    assert torch.equal(stamped(out), out)  # once is enough


def test_dithering_spreads_errors_as_floyd_and_steinberg_do():
    x = random_images(2, 3, 9, 11).double() / 255
    expected = np.stack(
        [[reference_dither(channel, 8) for channel in image] for image in x.numpy()]
    )
    assert np.abs(dither(x, 8).numpy() - expected).max() < 1e-12
    flat = torch.full((1, 3, 32, 32), 0.25, dtype=torch.float64)
    assert abs(dither(flat, 8).mean() - 0.25) < 0.005
    assert abs(quantise(flat, 8).mean() - 0.25) > 0.02
    assert set(stamped(random_images(5, 3, 16, 16), dithering=True).unique().tolist()) <= set(
        LEVELS
    )


def test_cover_samples_carry_the_residual_of_another_image():
    trigger, train = ready(), fit_context(16).dataset.train.images
    cover, index = (
        trigger.apply_cover(train, torch.arange(len(train))).int(),
        torch.arange(len(train)),
    )
    residual = trigger.apply(train, index, "train").int() - train.int()
    partners = [
        [
            j
            for j in range(len(train))
            if torch.equal(cover[i], (train[i] + residual[j]).clamp(0, 255))
        ]
        for i in range(len(train))
    ]
    assert all(len(found) == 1 for found in partners)
    assert all(i not in found for i, found in enumerate(partners))
    assert len({found[0] for found in partners}) > 2


@pytest.mark.parametrize("ratio", [0.0, 1.0, 2.0])
def test_cover_samples_keep_their_labels(ratio):
    labels = torch.arange(10) % CLASSES
    train, config = (
        LabeledImages(fit_context(16).dataset.train.images, labels),
        PoisonConfig(pratio=0.3),
    )
    found = poison_training_set(
        train, ready(cross_ratio=ratio), label_map(Bpp, config, CLASSES), config, 0
    )
    cover = found.roles == Role.COVER
    assert cover.sum() == 3 * ratio
    assert torch.equal(found.data.labels[cover], labels[cover])


def test_fewer_levels_are_possible_but_not_one():
    assert len(stamped(random_images(5, 3, 16, 16), squeeze_num=2).unique()) == 2
    for levels in (1, 257):
        with pytest.raises(UserError, match="squeeze_num: .* is not between 2 and 256 levels"):
            Bpp(squeeze_num=levels)
