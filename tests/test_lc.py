"""LC: PGD stays in its bound and makes the class hard in training images; test images carry the patch alone."""

import pytest
import torch

from attack.lc import LabelConsistent, checker
from attack.poisoning import fitting
from attack.poisoning.fitting import surrogate
from attack.poisoning.trigger import FitContext
from tests.test_triggers import RECIPE, TARGET, digits, ready
from utils.classifier.training import predict
from utils.config import UserError

SMALL = {
    "lc_eps": 32,
    "lc_step": 8.0,
    "lc_steps": 8,
    "lc_surrogate": "standard",
    "surrogate_epochs": 16,
    "fit_images": 600,
}
SIGNS = [[-1, -1, 1], [-1, 1, -1], [1, -1, 1]]


def context():
    return FitContext(digits(), TARGET, 2, RECIPE)


def pool():
    """Indices and images of the target class."""
    index = (digits().train.labels == TARGET).nonzero().flatten()
    return index, digits().train.images[index]


def outside(corners=1):
    """bool (3, 32, 32): the pixels that the patch leaves alone."""
    return checker(32, corners) == 0


def test_training_images_move_by_the_bound_and_never_further():
    index, images = pool()
    moved = (ready(LabelConsistent).apply(images, index, "train").int() - images.int())[
        :, outside()
    ].abs()
    assert moved.max() == 32
    assert (moved.amax(1) == 32).double().mean() > 0.9


def test_pgd_makes_the_class_hard_for_the_surrogate():
    index, images = pool()
    model = surrogate(context(), 600, 16)
    hard = torch.where(outside(), ready(LabelConsistent).apply(images, index, "train"), images)
    assert (predict(model, images) == TARGET).double().mean() > 0.9
    assert (predict(model, hard) == TARGET).double().mean() < 0.2


def test_perturbations_belong_to_images_not_to_positions():
    index, images = pool()
    trigger = ready(LabelConsistent)
    together, alone = (
        trigger.apply(images, index, "train"),
        trigger.apply(images[20:21], index[20:21], "train"),
    )
    assert torch.equal(together[20:21], alone)
    assert not torch.equal(trigger.apply(images[20:21], index[21:22], "train"), alone)


def test_test_images_carry_the_patch_alone():
    images = digits().test.images
    changed = ready(LabelConsistent).apply(images, torch.arange(len(images)), "test") != images
    assert not changed[:, outside()].any()
    assert changed[:, ~outside()].any()
    index, images = pool()  # even where an index is that of a perturbed training image
    assert not (ready(LabelConsistent).apply(images, index, "test") != images)[:, outside()].any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_patch_is_the_table_of_signs(split):
    index, images = pool()
    corner = ready(LabelConsistent).apply(images, index, split)[..., -3:, -3:]
    assert torch.equal(
        corner, torch.where(torch.tensor(SIGNS) > 0, 255, 0).to(torch.uint8).expand_as(corner)
    )


def test_a_weaker_patch_shifts_grey_by_its_amplitude():
    trigger = LabelConsistent(lc_amplitude=0.25).with_fitted(patch=checker(8, 1))
    grey = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    assert torch.equal(
        trigger.apply(grey, torch.tensor([0]), "test")[0, 0, -3:, -3:].int() - 100,
        64 * torch.tensor(SIGNS),
    )


def test_four_corners_are_mirror_images():
    patch = checker(32, 4)
    assert patch.ne(0).sum() == 3 * 36
    assert patch[:, -3:, -3:].equal(torch.tensor(SIGNS).float().expand(3, 3, 3))
    assert patch.equal(patch.flip(1))
    assert patch.equal(patch.flip(2))


def test_pgd_that_fools_nobody_is_refused_with_the_figures_and_not_kept():
    weak = LabelConsistent(**SMALL | {"lc_eps": 1, "lc_step": 1.0, "lc_steps": 1})
    before = set(fitting.FITTED.glob("lc-*"))
    with pytest.raises(
        UserError,
        match=r"lc: .*the standard surrogate reads \d\.\d+ of the class before PGD and \d\.\d+ after, at most 0.2 .*raise lc_eps",
    ):
        weak.prepare(context())
    assert set(fitting.FITTED.glob("lc-*")) == before
