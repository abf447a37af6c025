"""WaNet: displacements are read off ramps, eight levels to the pixel."""

import pytest
import torch

from attack.poisoning.config import PoisonConfig
from attack.poisoning.labels import label_map
from attack.poisoning.poison import Role, poison_training_set
from attack.wanet import WaNet
from tests.toys import CLASSES, fit_context, random_images
from utils.images.data import LabeledImages

SIDE, SLOPE, HALF_LEVEL = 32, 8, 1 / 16  # a ramp's rounding, in pixels
ACROSS = (SLOPE * torch.arange(SIDE, dtype=torch.uint8)).expand(
    1, 3, SIDE, SIDE
)  # value 8 x column
DOWN = ACROSS.transpose(2, 3)
PER_UNIT = (SIDE - 1) / 2  # pixels per unit of the grid


def ready(seed=0, side=SIDE, **keys):
    return WaNet(**keys).prepare(fit_context(side, seed=seed))


def stamped(trigger, x, split="train"):
    return trigger.apply(x.contiguous(), torch.arange(len(x)), split)


def displacement(trigger, ramp):
    """(H, W) pixels by which each pixel of a ramp is fetched from further along."""
    return (stamped(trigger, ramp)[0, 0].double() - ramp[0, 0].double()) / SLOPE


def test_no_strength_no_change():
    x = random_images(20, 3, SIDE, SIDE)
    assert torch.equal(stamped(ready(s=0.0), x), x)


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_a_constant_image_stays(level):
    x = torch.full((2, 3, SIDE, SIDE), level, dtype=torch.uint8)
    assert torch.equal(stamped(ready(), x), x)
    assert torch.equal(ready().apply_cover(x, torch.arange(2)), x)


def test_displacements_have_the_published_size():
    along = (
        torch.stack(
            [displacement(ready(seed), ramp) for seed in range(250) for ramp in (ACROSS, DOWN)]
        )
        .abs()
        .view(250, 2, -1)
    )
    assert along.amax((1, 2)).min() >= 0.3
    assert along.max() <= 0.75
    assert along.mean((1, 2)).min() >= 0.1
    assert along.mean((1, 2)).max() <= 0.3
    assert 0.17 <= along.mean() <= 0.21


def test_each_ramp_shows_its_own_channel_of_the_field():
    trigger = ready()
    for ramp, channel in ((ACROSS, 0), (DOWN, 1)):
        inner = slice(2, -2)  # the border cannot fetch from outside
        expected = 0.5 / SIDE * PER_UNIT * trigger.fitted["field"][0, inner, inner, channel]
        assert (
            displacement(trigger, ramp)[inner, inner] - expected
        ).abs().max() <= HALF_LEVEL + 1e-4


def test_a_field_along_one_axis_leaves_the_other():
    trigger = ready()
    for channel, moved, still in ((0, ACROSS, DOWN), (1, DOWN, ACROSS)):
        field = torch.zeros_like(trigger.fitted["field"])
        field[..., channel] = 1
        one = trigger.with_fitted(field=field, seed=trigger.fitted["seed"])
        assert (displacement(one, still) == 0).all()
        assert (displacement(one, moved)[2:-2, 2:-2] - 0.25).abs().max() <= HALF_LEVEL


def test_the_drawn_field_has_mean_size_1():
    field = ready(side=28).fitted["field"][
        0, ::9, ::9
    ]  # at 28 = 3 x 9 + 1 pixels the drawn points lie on pixels
    assert field.shape == (4, 4, 2)
    assert abs(field.abs().mean() - 1) < 1e-5


def test_one_field_for_train_and_test_and_another_for_another_seed():
    x = random_images(5, 3, SIDE, SIDE)
    assert torch.equal(stamped(ready(), x), stamped(ready(), x, "test"))
    assert not torch.equal(stamped(ready(), x), stamped(ready(seed=1), x))


@pytest.mark.parametrize("ramp", [ACROSS, DOWN])
def test_cover_samples_jitter_about_the_field_by_half_a_pixel(ramp):
    trigger, index = ready(), torch.arange(60)
    cover = trigger.apply_cover(ramp.expand(60, -1, -1, -1).contiguous(), index).int()
    jitter = (cover - stamped(trigger, ramp).int())[:, 0, 2:-2, 2:-2]
    assert (
        jitter.abs().max() == 4
    )  # up to 0.484 px = 3.9 levels, and what rounding two numbers adds
    assert abs(jitter.double().mean()) < 0.1
    assert 1.8 < jitter.double().abs().mean() < 2.1
    assert len({image.numpy().tobytes() for image in cover}) == 60  # every sample its own


def test_two_cover_samples_per_poisoned_one_and_all_keep_their_labels():
    labels = torch.arange(400) % CLASSES
    train, config = (
        LabeledImages(random_images(400, 3, SIDE, SIDE), labels),
        PoisonConfig(pratio=0.1),
    )
    found = poison_training_set(train, ready(), label_map(WaNet, config, CLASSES), config, 0)
    cover = found.roles == Role.COVER
    assert found.poison_indicator.sum() == 40
    assert cover.sum() == 80
    assert torch.equal(found.data.labels[cover], labels[cover])
    assert len(labels[cover].unique()) == CLASSES
    assert (found.data.images[cover] != train.images[cover]).flatten(1).any(1).all()
