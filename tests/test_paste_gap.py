"""Which classes pasting accuses, on planted rates, residuals and features."""

from types import SimpleNamespace

import pytest
import torch

from defense.elixir.paste_gap import (
    COMMON,
    ERRORS,
    FEWEST,
    GAP,
    GROUP,
    PAIR,
    PATTERN,
    PATTERN_OF,
    STRENGTH,
    PasteEvidence,
    paste_evidence,
)
from defense.elixir.target_label import Discrepancy

SIDE, WIDE = 4, 12
nobody = lambda pattern, label, source=None: 0.0


def planted(carriers, n=80, seed=0, apart=8.0, high=0.8, low=0.1):
    """Rates, residuals, labels and features of classes of n samples, carriers[k] of class k poisoned.

    The residuals of carriers are 100 all over, beside noise; their features lie apart.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    labels = torch.arange(len(carriers)).repeat_interleave(n)
    carries = torch.arange(n).repeat(len(carriers)) < torch.tensor(carriers)[labels]
    mean = torch.where(carries, high, low)
    rates = (mean + 0.08 * normal(len(labels))).clamp(0, 1)
    shape = (len(labels), 3, SIDE, SIDE)
    residuals = (20 * normal(*shape) + 100 * carries[:, None, None, None]).short()
    features = normal(len(labels), WIDE) + labels[:, None]
    features[:, 0] += apart * carries
    return SimpleNamespace(
        rates=rates, residuals=residuals, labels=labels, features=features, carries=carries
    )


def evidence(world, num_classes, obeyed=nobody, leads_to=None, imposed=None, explained=()):
    columns = world.rates, world.residuals, world.labels, world.features
    leads_to = world.labels if leads_to is None else leads_to
    nothing = lambda pattern: torch.zeros(num_classes, num_classes, dtype=torch.float64)
    by_votes = torch.isin(torch.arange(num_classes), torch.tensor(explained, dtype=torch.int64))
    return paste_evidence(*columns, leads_to, by_votes, obeyed, imposed or nothing)


def said(pattern=0.0, gap=0.0, error=0.0, common=0.0, pair=0.0, count=PATTERN_OF):
    """What pasting says of one class, by hand."""
    values = (torch.tensor([v], dtype=torch.float64) for v in (0.1, pattern, gap, error, common))
    number = lambda value: torch.tensor([value])
    pairs = torch.tensor([pair], dtype=torch.float64), number(4), number(count)
    return PasteEvidence(*values, number(3), *pairs, torch.zeros(3, SIDE, SIDE))


def accused(found):
    return found.accused.nonzero().flatten().tolist()


def test_a_planted_gap_is_found_with_its_error():
    world = planted([30, 0])
    found = evidence(world, 2)
    own = world.labels == 0
    upper, lower = (world.rates[own & which].double() for which in (world.carries, ~world.carries))
    assert found.gap[0].item() == pytest.approx((upper.mean() - lower.mean()).item(), abs=1e-6)
    variances = [g.var(correction=0) / len(g) + 0.25 / len(g) ** 2 for g in (upper, lower)]
    assert found.error[0].item() == pytest.approx(sum(variances).sqrt().item(), abs=1e-6)
    assert found.rate[0].item() == pytest.approx(world.rates[own].mean().item(), abs=1e-6)
    assert accused(found) == [0]
    assert not found.unsure.any()


def test_a_gap_of_few_carriers_asks_for_more_samples():
    found = evidence(planted([8, 0]), 2)
    assert not accused(found)
    assert found.unsure.tolist() == [True, False]


@pytest.mark.parametrize(
    ("carriers", "expected"), [([40, 0, 20, 0, 60], [0, 2, 4]), ([12, 0], [0])]
)
def test_any_number_of_classes_is_accused_each_for_itself(carriers, expected):
    found = evidence(planted(carriers), len(carriers))
    assert accused(found) == expected
    for k in range(len(carriers)):  # no other class has a say
        world = planted(carriers)
        rows = world.labels == k
        alone = {key: value[rows] for key, value in vars(world).items()}
        assert (accused(evidence(SimpleNamespace(**alone), len(carriers))) == [k]) == (
            k in expected
        )


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_a_clean_class_is_not_accused(drift):
    """Of 150 clean classes none, with 95 % confidence fewer than one in 50.

    Rates may follow the features: images of one kind paste more than those of another.
    """
    count = 0
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        world = planted([0] * 10, n=64, seed=seed)
        spread = torch.rand(640, generator=generator) ** 3
        kind = world.features[:, 1] - world.labels > 0.5
        world.rates = (spread * 0.8 + drift * kind).clamp(0, 1)
        found = evidence(world, 10)
        assert found.gap.isfinite().any()
        count += len(accused(found))
    assert count == 0
    assert 1 - 0.05 ** (1 / 150) < 0.02


def test_a_class_that_is_poisoned_through_and_through_is_accused_by_its_pattern():
    """It has no clean group: nothing in its rates differs."""
    world, asked = planted([0, 80, 0]), []

    def obeyed(pattern, label, source=None):
        asked.append((label, pattern))
        return float(pattern.mean() > 80)

    found = evidence(world, 3, obeyed)
    assert accused(found) == [1]
    assert found.pattern.tolist() == [0, 1, 0]
    assert not found.gap[1] - ERRORS * found.error[1] > GAP
    means = [world.residuals[world.labels == k].float().mean(0) for k in range(3)]
    for k, mean in enumerate(means):
        assert any(label == k and torch.equal(pattern, mean) for label, pattern in asked)


def test_the_pattern_of_few_carriers_is_not_drowned_by_the_others():
    """The mean of all is too faint to be obeyed; that of the upper group is not."""
    world = planted([PATTERN_OF + 6, 0], high=0.3)
    assert world.residuals[world.labels == 0].float().mean() < 30
    found = evidence(world, 2, lambda pattern, label: float(pattern.mean() > 50))
    assert accused(found) == [0]
    assert found.gap[0] < GAP + ERRORS * found.error[0]


def test_the_mean_of_too_few_residuals_is_no_pattern():
    asked = []
    world = planted([PATTERN_OF - 4], n=60)
    evidence(world, 1, lambda pattern, label: asked.append(pattern) or 0.0)
    [pattern] = asked
    assert torch.equal(pattern, world.residuals.float().mean(0))


@pytest.mark.parametrize(("n", "asked"), [(FEWEST - 1, False), (FEWEST, True)])
def test_a_class_of_few_samples_is_never_accused(n, asked):
    found = evidence(planted([n // 2] * 2, n=n), 2, lambda pattern, label: 1.0)
    assert found.accused.tolist() == [asked] * 2
    for values in (found.rate, found.pattern):
        assert values.isfinite().tolist() == [asked] * 2
    if not asked:
        assert not found.unsure.any()


def test_classes_of_two_or_three_images_are_never_accused():
    """300 of them, whatever they paste: there is nothing that they could be split into."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300).repeat_interleave(torch.arange(300) % 2 + 2)
    n = len(labels)
    world = SimpleNamespace(
        rates=torch.rand(n, generator=generator).round(),
        residuals=torch.randint(-200, 200, (n, 3, SIDE, SIDE), generator=generator).short(),
        labels=labels,
        features=torch.randn(n, WIDE, generator=generator),
    )
    found = evidence(world, 300, lambda pattern, label: 1.0)
    assert not found.accused.any()
    assert not found.unsure.any()
    assert found.rate.isnan().all()


def test_a_sample_that_nothing_was_pasted_from_is_not_counted():
    world = planted([30, 0])
    whole = evidence(world, 2)
    world.rates[world.labels == 1] = torch.nan
    some = evidence(world, 2)
    assert some.rate[1].isnan()
    assert some.pattern[1].isnan()
    for key in ("rate", "pattern", "gap", "error"):
        assert getattr(some, key)[0] == getattr(whole, key)[0]
    rows = ((world.labels == 0).nonzero().flatten())[FEWEST - 1 :]
    world.rates[rows] = torch.nan
    assert evidence(world, 2).rate.isnan().all()


def test_groups_of_a_handful_have_no_gap():
    found = evidence(planted([GROUP - 1], n=60), 1)
    assert found.gap.isnan().all()
    assert not found.accused.any()


@pytest.mark.parametrize(
    ("pattern", "gap", "error", "accused", "unsure"),
    [
        (PATTERN, 0.0, 0.0, False, False),
        (PATTERN + 1e-6, 0.0, 0.0, True, False),
        (0.0, GAP + 0.3, 0.1001, False, True),
        (0.0, GAP + 0.3, 0.0999, True, False),
        (0.0, GAP + 0.1, 0.1001, False, False),
        (torch.nan, torch.nan, torch.nan, False, False),
        (PATTERN + 0.1, torch.nan, torch.nan, True, False),
    ],
)
def test_bounds_by_hand(pattern, gap, error, accused, unsure):
    found = said(pattern, gap, error)
    assert (found.accused.item(), found.unsure.item()) == (accused, unsure)
    assert found.source.item() == -1


@pytest.mark.parametrize(
    ("common", "pair", "count", "accused", "unsure", "source"),
    [
        (COMMON, PAIR, PATTERN_OF, False, False, -1),
        (COMMON + 1e-6, 0.0, PATTERN_OF, True, False, 3),
        (0.0, PAIR + 1e-6, PATTERN_OF, True, False, 4),
        (COMMON + 0.1, PAIR + 0.1, PATTERN_OF, True, False, 4),
        (0.0, PAIR + 1e-6, PATTERN_OF - 1, False, True, -1),
        (COMMON + 0.1, PAIR + 0.1, PATTERN_OF - 1, True, False, 3),
        (0.0, torch.nan, 2, False, False, -1),
    ],
)
def test_bounds_of_common_pattern_and_pair_by_hand(common, pair, count, accused, unsure, source):
    found = said(common=common, pair=pair, count=count)
    assert (found.accused.item(), found.unsure.item()) == (accused, unsure)
    assert found.source.item() == source
    obeyed_by_all = said(pattern=PATTERN + 0.1, common=common, pair=pair, count=count)
    assert obeyed_by_all.source.item() == -1


def test_the_common_pattern_is_the_mean_of_all_that_move_and_accuses_every_class_it_leads_to():
    """All to all: the few carriers of each class have one trigger, which moves each class to the next."""
    world, asked = planted([6, 6, 6, 0], high=0.1), []
    leads_to = torch.where(world.carries, (world.labels - 1) % 4, world.labels)

    def imposed(pattern):
        asked.append(pattern)
        rise = torch.zeros(4, 4, dtype=torch.float64)
        for k in range(3):
            rise[(k - 1) % 4, k] = 0.01 * (k + 1) * pattern.mean() / STRENGTH / 3
        return rise

    found = evidence(world, 4, leads_to=leads_to, imposed=imposed)
    [pattern] = asked
    expected = STRENGTH * world.residuals[world.carries].float().mean(0)
    torch.testing.assert_close(pattern, expected)
    torch.testing.assert_close(found.common_pattern, expected)
    assert found.by_common.tolist() == [True, True, True, False]
    assert found.source.tolist() == [3, 0, 1, -1]
    assert accused(found) == [0, 1, 2]


@pytest.mark.parametrize("by_votes", [True, False])
def test_what_one_class_explains_is_not_in_the_common_pattern(by_votes):
    """Whether its votes accuse the class, or its own pattern does."""
    world, asked = planted([40, 0, 0]), []
    leads_to = torch.where(world.carries, 1, world.labels)
    leads_to[(world.labels == 2).nonzero().flatten()[:9]] = 0
    ask = lambda pattern: asked.append(pattern) or torch.zeros(3, 3, dtype=torch.float64)
    obeyed = nobody if by_votes else lambda pattern, label, source=None: float(label == 0)
    evidence(world, 3, obeyed, leads_to, ask, [0] if by_votes else [])
    [pattern] = asked
    expected = world.residuals[(world.labels == 2) & (leads_to == 0)].float().mean(0)
    torch.testing.assert_close(pattern, STRENGTH * expected)


def test_where_nothing_moves_the_common_pattern_is_nothing():
    found = evidence(planted([6, 0]), 2, imposed=lambda pattern: pattern.sum().expand(2, 2))
    assert not found.common_pattern.any()
    assert not found.by_common.any()


def test_a_pair_is_pasted_on_the_class_that_it_is_led_to_alone():
    """One source class: the trigger means nothing on images of the others."""
    world, asked = planted([30, 0, 0], high=0.1), []
    leads_to = torch.where(world.carries, 2, world.labels)
    leads_to[(world.labels == 0).nonzero().flatten()[-3:]] = 1  # fewer, and without a trigger

    def obeyed(pattern, label, source=None):
        asked.append((label, source))
        return 0.9 if source == 2 and pattern.mean() > 80 else 0.05

    found = evidence(world, 3, obeyed, leads_to)
    assert [pair for pair in asked if pair[1] is not None] == [(0, 2)]
    assert accused(found) == [0]
    assert found.by_pair.tolist() == [True, False, False]
    assert found.pair_source.tolist() == [2, -1, -1]
    assert found.pair_count.tolist() == [30, 0, 0]


def test_a_pair_of_a_handful_is_not_asked():
    world = planted([GROUP - 1, 0])
    leads_to = torch.where(world.carries, 1, world.labels)
    found = evidence(world, 2, lambda *_: 1.0, leads_to)
    assert found.pair.isnan().all()
    assert found.pair_count.tolist() == [GROUP - 1, 0]


def discrepancy(outlies, paste, too_small):
    """A verdict of four classes, as far as `is_target` looks; too few for the inflow to speak."""
    judged = SimpleNamespace(outlies=torch.tensor(outlies), inflow=SimpleNamespace(threshold=1.0))
    inflow = SimpleNamespace(seen=torch.ones(4) > 0)
    return Discrepancy(None, None, None, inflow, judged, paste, too_small)


def test_a_target_label_is_accused_by_any_measure_unless_its_class_is_too_small():
    accuse = lambda *which: SimpleNamespace(accused=torch.tensor(which))
    votes, pasting = [True, False, True, False], accuse(False, True, True, False)
    small = torch.tensor([True, False, False, True])
    assert discrepancy(votes, None, None).targets == (0, 2)
    assert discrepancy(votes, pasting, None).targets == (0, 1, 2)
    assert discrepancy(votes, pasting, small).targets == (1, 2)
    assert discrepancy(votes, pasting, torch.tensor([True] * 4)).targets == ()
