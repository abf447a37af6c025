"""Adaptive-Blend: half of sixteen pieces in training, all at test, covers with true labels."""

import torch

from attack.adaptive_blend import AdaptiveBlend
from attack.blended import Blended
from attack.poisoning.config import PoisonConfig
from attack.poisoning.labels import label_map
from attack.poisoning.poison import Role, poison_training_set
from tests.toys import CLASSES, fit_context, random_images
from utils.images.data import LabeledImages

X, INDEX = random_images(80, 3, 32, 32), torch.arange(80)
TRIGGER = AdaptiveBlend().prepare(fit_context(32))


def changed_pieces(x, out):
    """bool (N, 16): which of 4 x 4 pieces of 8 x 8 pixels differ."""
    return (x != out).any(1).unflatten(1, (4, 8)).unflatten(3, (4, 8)).any(4).any(2).flatten(1)


def blended(alpha):
    return Blended(alpha_train=alpha).prepare(fit_context(32)).apply(X, INDEX, "train")


def test_eight_pieces_in_training_and_sixteen_at_test():
    assert (changed_pieces(X, TRIGGER.apply(X, INDEX, "train")).sum(1) == 8).all()
    assert (changed_pieces(X, TRIGGER.apply(X, INDEX, "test")).sum(1) == 16).all()


def test_each_sample_has_pieces_of_its_own_and_all_pieces_occur():
    pieces = changed_pieces(X, TRIGGER.apply(X, INDEX, "train"))
    assert len(pieces.unique(dim=0)) > 70
    assert ((pieces.sum(0) > 20) & (pieces.sum(0) < 60)).all()
    assert torch.equal(
        changed_pieces(X[:1], TRIGGER.apply(X[:1], INDEX[7:8], "train")), pieces[7:8]
    )  # by index, not by place
    other = AdaptiveBlend().prepare(fit_context(32, seed=1))
    assert not torch.equal(changed_pieces(X, other.apply(X, INDEX, "train")), pieces)


def test_where_it_is_laid_it_is_blended():
    train, test = TRIGGER.apply(X, INDEX, "train").int(), TRIGGER.apply(X, INDEX, "test").int()
    laid = (
        changed_pieces(X, train.to(torch.uint8))
        .view(-1, 1, 4, 4)
        .repeat_interleave(8, 2)
        .repeat_interleave(8, 3)
    )
    assert (
        (train - torch.where(laid, blended(0.15), X).int()).abs() <= 1
    ).all()  # the same formula in another order
    assert ((test - blended(0.2).int()).abs() <= 1).all()


def test_cover_samples_carry_the_same_trigger_and_their_labels():
    labels = torch.arange(80) % CLASSES
    config = PoisonConfig(pratio=0.2, attack_target=1)
    found = poison_training_set(
        LabeledImages(X, labels), TRIGGER, label_map(AdaptiveBlend, config, CLASSES), config, 0
    )
    poison, cover = found.poison_indicator, found.roles == Role.COVER
    assert poison.sum() == cover.sum() == 16
    assert not (poison & cover).any()
    assert (found.data.labels[poison] == 1).all()
    assert torch.equal(found.data.labels[cover], labels[cover])
    assert (changed_pieces(X, found.data.images)[poison | cover].sum(1) == 8).all()


def test_sides_that_are_no_multiple_of_four_have_sixteen_pieces_too():
    pieces = AdaptiveBlend().prepare(fit_context(30)).pieces(INDEX, 30)
    assert pieces.shape == (80, 1, 30, 30)
    assert ((pieces.float().mean((1, 2, 3)) - 0.5).abs() < 0.06).all()
