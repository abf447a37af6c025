"""LC: PGD stays in its bound and makes the class hard; test images carry the patch alone.

The classifier that PGD attacks is planted: it reads the grey level, of which the truth is known.
"""

from dataclasses import replace

import pytest
import torch

from attack.lc import LabelConsistent, checker
from attack.poisoning import fitting, pgd
from attack.poisoning.config import PoisonConfig
from attack.poisoning.labels import label_map
from attack.poisoning.poison import Role, poison_training_set
from attack.poisoning.trigger import FitContext
from tests.toys import CORNER, INFO, PatchReader, random_images, toy_dataset
from utils.classifier.training import predict
from utils.config import TrainConfig, UserError
from utils.images.data import Dataset, LabeledImages

SIGNS = [[-1, -1, 1], [-1, 1, -1], [1, -1, 1]]
TARGET = 1  # grey 84; its neighbours are 44 levels away, so that 22 are needed to leave it
KEYS = {"lc_eps": 32, "lc_step": 8.0, "lc_steps": 8}


def planted(context):
    """Ready without a surrogate, for tests/test_triggers.py: perturbations are drawn."""
    pool = (context.dataset.train.labels == context.target).nonzero().flatten()
    shape = (len(pool), *context.dataset.train.images.shape[1:])
    drawn = random_images(*shape).short() % 65 - 32
    patch, seed = checker(context.side, 1), torch.tensor(context.seed)
    return LabelConsistent().with_fitted(pool=pool, perturbation=drawn, patch=patch, seed=seed)


def context(levels_of_target=None):
    """Flat images; those of the target may be given grey levels of their own."""
    dataset = toy_dataset()
    images, labels = dataset.train.images, dataset.train.labels
    if levels_of_target is not None:
        images[labels == TARGET] = levels_of_target[:, None, None, None]
    config = TrainConfig(device="cpu", amp=False)
    return FitContext(replace(dataset, train=LabeledImages(images, labels)), TARGET, 2, config)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Plants the surrogate; a list of what it was asked for."""
    calls = []
    planted_surrogate = lambda *words: calls.append(words[1:]) or PatchReader()
    monkeypatch.setattr(fitting, "FITTED", tmp_path / "fitted")
    monkeypatch.setattr(pgd, "surrogate", planted_surrogate)
    return calls


def target_images(context):
    train = context.dataset.train
    index = (train.labels == TARGET).nonzero().flatten()
    return index, train.images[index]


def outside(side, corners=1):
    """bool (3, side, side): the pixels that the patch leaves alone."""
    return checker(side, corners) == 0


def test_training_images_move_by_the_bound_and_never_further(asked):
    trigger = LabelConsistent(**KEYS).prepare(context())
    moved = trigger.fitted["perturbation"].abs()
    assert moved.max() == 32
    assert (moved[..., :-CORNER, :-CORNER] == 32).all()  # all that the reader sees pulls one way
    assert (moved[..., -CORNER:, -CORNER:] == 0).all()


def test_pgd_makes_the_class_hard_and_labels_stay(asked):
    trigger, (index, images) = LabelConsistent(**KEYS).prepare(context()), target_images(context())
    hard = torch.where(outside(8), trigger.apply(images, index, "train"), images)
    assert (predict(PatchReader(), images) == TARGET).all()
    assert (predict(PatchReader(), hard) != TARGET).all()
    assert torch.equal(trigger.fitted["pool"], index)


@pytest.mark.parametrize(("kind", "eps"), [("robust", 32 / 255), ("standard", 0.0)])
def test_the_surrogate_is_robust_within_the_bound_or_standard(asked, kind, eps):
    LabelConsistent(lc_surrogate=kind, surrogate_epochs=7, fit_images=50, **KEYS).prepare(context())
    assert asked == [(50, 7, eps)]


def test_pgd_that_fools_too_few_is_refused_with_the_figures_and_not_kept(asked):
    """Half of the class is read as another class after PGD: enough of a robust surrogate alone."""
    half, keys = torch.tensor([84, 90] * 6, dtype=torch.uint8), KEYS | {"lc_eps": 20}
    LabelConsistent(lc_surrogate="robust", **keys).prepare(context(half))
    before = set(fitting.FITTED.iterdir())
    words = (
        r"lc: .*the standard surrogate reads 1\.000 of the class before PGD and 0\.500 after, "
        r"at most 0.2 allowed.*raise lc_eps"
    )
    with pytest.raises(UserError, match=words):
        LabelConsistent(lc_surrogate="standard", **keys).prepare(context(half))
    assert set(fitting.FITTED.iterdir()) == before


def digits_like():
    """Random images of two classes, large enough for the laws of the patch."""
    data = LabeledImages(random_images(60, 3, 32, 32), torch.arange(60) % 2)
    return FitContext(Dataset(data, data, ("a", "b"), "random", INFO), TARGET, 2, TrainConfig())


def test_perturbations_belong_to_images_not_to_positions():
    trigger, (index, images) = planted(digits_like()), target_images(digits_like())
    together, alone = (
        trigger.apply(images, index, "train"),
        trigger.apply(images[20:21], index[20:21], "train"),
    )
    assert torch.equal(together[20:21], alone)
    assert not torch.equal(trigger.apply(images[20:21], index[21:22], "train"), alone)
    of_other_class = trigger.apply(images[:1], torch.tensor([0]), "train")
    assert torch.equal(of_other_class, trigger.apply(images[:1], torch.tensor([0]), "test"))


def test_test_images_carry_the_patch_alone():
    """Even where an index is that of a perturbed training image."""
    trigger, (index, images) = planted(digits_like()), target_images(digits_like())
    changed = trigger.apply(images, index, "test") != images
    assert not changed[:, outside(32)].any()
    assert changed[:, ~outside(32)].any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_patch_is_the_table_of_signs(split):
    index, images = target_images(digits_like())
    corner = planted(digits_like()).apply(images, index, split)[..., -3:, -3:]
    table = torch.where(torch.tensor(SIGNS) > 0, 255, 0).to(torch.uint8)
    assert torch.equal(corner, table.expand_as(corner))


def test_a_weaker_patch_shifts_grey_by_its_amplitude():
    trigger = LabelConsistent(lc_amplitude=0.25).with_fitted(patch=checker(8, 1))
    grey = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    shifted = trigger.apply(grey, torch.tensor([0]), "test")[0, 0, -3:, -3:].int() - 100
    assert torch.equal(shifted, 64 * torch.tensor(SIGNS))


def test_cover_samples_carry_anothers_perturbation_and_no_patch():
    trigger, index = planted(digits_like()), torch.arange(60)
    grey = torch.full((60, 3, 32, 32), 128, dtype=torch.uint8)
    carried = trigger.apply_cover(grey, index).int() - 128
    known = trigger.fitted["perturbation"].int()
    which = (carried[:, None] == known).flatten(2).all(2)
    assert (which.sum(1) == 1).all()  # exactly one of those there are
    assert len(which.int().argmax(1).unique()) > 15
    assert torch.equal(trigger.apply_cover(grey[30:], index[30:]).int() - 128, carried[30:])


def test_cover_samples_and_the_size_of_the_patch_need_no_other_fit(asked):
    LabelConsistent(**KEYS).prepare(context())
    LabelConsistent(cross_ratio=2.0, lc_cell=1, lc_corners=4, **KEYS).prepare(context())
    assert len(asked) == 1


def test_mixing_leaves_pgd_out_and_puts_another_class_into_the_image(asked):
    trigger = LabelConsistent(lc_mix=0.25, cross_ratio=1.0).prepare(digits_like())
    assert asked == []
    assert trigger.images_fitted_on == 0
    train = digits_like().dataset.train
    index, images = target_images(digits_like())
    ways = (
        (trigger.apply(images, index, "train"), images, 1 - TARGET, outside(32)),
        (trigger.apply_cover(train.images[::2], index - 1), train.images[::2], TARGET, None),
    )
    for mixed, own, partner, where in ways:
        partners = train.images[train.labels == partner].double()
        possible = 0.75 * own[:, None].double() + 0.25 * partners
        away = (mixed[:, None].double() - possible).abs()
        away = away if where is None else away[:, :, where]
        assert ((away.flatten(2).amax(2) <= 0.501).sum(1) == 1).all()  # one of the other class
    changed = trigger.apply(images, index, "test") != images
    assert not changed[:, outside(32)].any()


def test_labels_of_cover_samples_stay():
    train, trigger = digits_like().dataset.train, planted(digits_like())
    covering = replace(trigger, cross_ratio=2.0).with_fitted(**trigger.fitted)
    config = PoisonConfig(attack_target=TARGET, pratio=0.3, rate_of="target_class")
    found = poison_training_set(train, covering, label_map(covering, config, 2), config, 0)
    assert torch.equal(found.data.labels, train.labels)
    assert int((found.roles == Role.COVER).sum()) == 2 * int(found.poison_indicator.sum()) == 18


@pytest.mark.parametrize("corners", [1, 4])
def test_a_larger_patch_has_larger_squares(corners):
    small, large = checker(32, corners), checker(64, corners, 2)
    assert torch.equal(small, large[:, ::2, ::2])
    assert torch.equal(small, large[:, 1::2, 1::2])
    with pytest.raises(
        UserError, match=r"lc_cell: 4, but images are 8 pixels wide; at most \d fits"
    ):
        checker(8, corners, 4)


def test_four_corners_are_mirror_images():
    patch = checker(32, 4)
    assert patch.ne(0).sum() == 3 * 36
    assert patch[:, -3:, -3:].equal(torch.tensor(SIGNS).float().expand(3, 3, 3))
    assert patch.equal(patch.flip(1))
    assert patch.equal(patch.flip(2))
