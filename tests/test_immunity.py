"""Triggers pasted on training images: how many, how strong, and what a training makes of them."""

from dataclasses import replace

import pytest
import torch

from defense.elixir.immunity import BEYOND, OBEYED, OWN, SHARE, STRENGTHS, Immunity
from tests.toys import random_images
from utils.images.data import to_unit

SIDE, K = 6, 4


def residuals(n=30, seed=0):
    """A pattern of 60 in one corner, beside noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = 10 * torch.randn(n, 3, SIDE, SIDE, generator=generator)
    noise[..., :2, :2] += 60
    return noise.round().short()


def immunity(labels=None, obeyed=lambda pattern, label: 1.0, n=30):
    labels = torch.full((n,), 2) if labels is None else labels
    return Immunity.of(residuals(len(labels)), labels, K, obeyed)


def drawn(work, seed=0, n=4000):
    """What becomes of grey images, and the share of a batch that is touched."""
    x = torch.full((n, 3, SIDE, SIDE), 0.5)
    out = work(x, torch.arange(n) % K, torch.Generator().manual_seed(seed))
    return x, out, (out != x).flatten(1).any(1)


def test_about_a_share_of_a_batch_gets_a_trigger_and_the_rest_stays():
    x, out, touched = drawn(immunity())
    assert abs(touched.double().mean() - SHARE) < 0.03
    assert torch.equal(out[~touched], x[~touched])


def test_shape_and_range_are_those_of_images_and_the_batch_is_not_written_to():
    x = to_unit(random_images(500, 3, SIDE, SIDE))
    before, y = x.clone(), torch.arange(500) % K
    out = immunity()(x, y, torch.Generator().manual_seed(0))
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert ((out >= 0) & (out <= 1)).all()
    assert torch.equal(x, before)
    assert torch.equal(y, torch.arange(500) % K)


def test_images_of_every_label_are_among_them():
    """The trigger says nothing for its label, nor against it."""
    _, _, touched = drawn(immunity())
    labels = torch.arange(len(touched)) % K
    shares = [touched[labels == k].double().mean().item() for k in range(K)]
    assert shares == pytest.approx([SHARE] * K, abs=0.06)


def test_draws_follow_the_generator():
    work = immunity()
    assert torch.equal(drawn(work, 1)[1], drawn(work, 1)[1])
    assert not torch.equal(drawn(work, 1)[1], drawn(work, 2)[1])


def test_one_generator_gives_every_epoch_triggers_of_its_own():
    work, generator = immunity(), torch.Generator().manual_seed(0)
    x, y = torch.full((64, 3, SIDE, SIDE), 0.5), torch.zeros(64).long()
    assert not torch.equal(work(x, y, generator), work(x, y, generator))


def test_without_carriers_nothing_is_pasted():
    x, out, _ = drawn(immunity(torch.empty(0, dtype=torch.int64)))
    assert torch.equal(out, x)


@pytest.mark.parametrize("least", STRENGTHS)
def test_the_least_strength_that_the_victim_obeys_is_taken(least):
    mean = residuals().float().mean(0)
    obeys = lambda pattern, label: (
        OBEYED * float(pattern.abs().sum() >= 0.999 * least * mean.abs().sum())
    )
    found = immunity(obeyed=obeys)
    assert found.strength[2] == least
    assert found.own[2] == OWN[0]
    torch.testing.assert_close(found.patterns[2], mean)


@pytest.mark.parametrize("best", STRENGTHS)
def test_where_none_suffices_that_which_is_obeyed_most_is_taken_with_more_of_a_carriers_own(best):
    mean = residuals().float().mean(0)
    size = lambda pattern: float(pattern.abs().sum() / mean.abs().sum())
    found = immunity(obeyed=lambda pattern, label: 0.5 - 0.01 * abs(size(pattern) - best))
    assert found.strength[2] == best
    assert found.own[2] == OWN[1]


def test_each_label_has_a_pattern_and_a_strength_of_its_own():
    labels, asked = torch.arange(30) % 2 * 3, []
    obeyed = lambda pattern, label: asked.append(label) or (1.0 if label == 3 else 0.1)
    found, given = immunity(labels, obeyed), residuals()
    for k in (0, 3):
        torch.testing.assert_close(found.patterns[k], given[labels == k].float().mean(0))
    assert found.own.tolist() == [OWN[1], 0, 0, OWN[0]]
    assert found.strength[[1, 2]].tolist() == [0, 0]
    assert (found.patterns[[1, 2]] == 0).all()
    assert set(asked) == {0, 3}


def test_what_is_pasted_lies_between_nothing_and_the_pattern_beyond_its_strength():
    """Where all carriers are alike there is nothing of their own."""
    alike = torch.zeros(10, 3, SIDE, SIDE, dtype=torch.int16)
    alike[..., 0, 0] = 20
    found = Immunity.of(alike, torch.ones(10).long(), K, lambda pattern, label: 1.0)
    _, out, touched = drawn(found)
    added = (out[touched] - 0.5) * 255
    assert added[..., 1:, :].abs().max() < 1e-4
    corner = added[..., 0, 0]
    most = BEYOND * STRENGTHS[0] * 20
    assert 0 <= corner.min() < 0.1 * most
    assert 0.9 * most < corner.max() <= most + 1e-3
    assert corner.mean().item() == pytest.approx(most / 2, rel=0.1)


def test_a_part_of_what_is_a_carriers_own_is_pasted_beside_it():
    found = replace(immunity(), strength=torch.zeros(K))
    _, out, touched = drawn(found)
    own = (residuals().float() - found.patterns[2]) * OWN[0]
    added = (out[touched] - 0.5) * 255
    assert added.abs().max() <= own.abs().max() + 1e-3
    scale = (added.flatten(1) @ own.flatten(1).T / own.flatten(1).square().sum(1)).max(1).values
    assert ((scale >= 0) & (scale <= 1 + 1e-3)).all()
    assert scale.max() > 0.9
