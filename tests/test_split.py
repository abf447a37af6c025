"""Who of a class carries the trigger: scores that no sample has a say in, and two groups of them."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from defense.elixir.split import (
    CARRIER,
    CLEAN,
    EPSILON,
    FEWEST,
    Groups,
    across,
    combined_scores,
    left_out_scores,
    logit,
    standardised,
    trusted_half,
    upper_group,
)

N, WIDE = 150, 60  # samples, features


def draws(seed):
    """A keyed source of normal numbers: shape -> float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def planted(seed, share=0.3, apart=8.0, known=0.545):
    """Carriers, features in which these lie apart in one direction, and a witness of them.

    With `known` standard deviations between the groups its AUC is about .65.
    """
    normal = draws(seed)
    carrier = torch.arange(400) < 400 * share
    direction = torch.nn.functional.normalize(normal(32), dim=0)
    view = normal(400, 32) + apart * carrier[:, None] * direction
    return carrier, view, normal(400) + known * carrier


def auc(carrier, scores):
    return roc_auc_score(carrier.numpy(), scores.numpy())


def with_all(view, witness):
    """Scores along the direction that all samples give, each sample's own witness included."""
    x, w = standardised(view), standardised(witness)
    return x @ (x.T @ w)


def test_scores_are_those_of_a_loop_that_leaves_each_sample_out():
    """Mean and deviation are those of all samples; what is left out is the sample's own term."""
    normal = draws(0)
    view, witness = 5 + 3 * normal(20, 3, 2, 2), normal(20)
    x = (view - view.mean(0)) / (view.var(0, correction=0).sqrt() + EPSILON)
    w = (witness - witness.mean()) / (witness.var(correction=0).sqrt() + EPSILON)
    expected = []
    for i in range(20):
        direction = sum(x[j] * w[j] for j in range(20) if j != i)
        expected.append((x[i] * direction).sum() / 20)
    torch.testing.assert_close(left_out_scores(view, witness), torch.stack(expected))
    torch.testing.assert_close(left_out_scores(view.float(), witness), torch.stack(expected))


def test_a_witness_of_noise_is_not_found_in_features_of_noise():
    """Each sample would find its own witness again, had it a say in the direction."""
    left_out, included = [], []
    for seed in range(60):
        normal = draws(seed)
        view, witness = normal(N, WIDE), normal(N)
        high = witness > witness.median()
        left_out.append(auc(high, left_out_scores(view, witness)))
        included.append(auc(high, with_all(view, witness)))
    assert sum(left_out) / 60 == pytest.approx(0.5, abs=0.03)
    assert sum(included) / 60 > 0.75
    assert min(included) > 0.6


@pytest.mark.parametrize("share", [0.15, 0.3, 0.9])
def test_a_weak_witness_finds_the_planted_direction(share):
    for seed in range(5):
        carrier, view, witness = planted(seed, share)
        assert 0.5 < auc(carrier, witness) < 0.8
        assert auc(carrier, left_out_scores(view, witness)) > 0.99


def test_a_witness_that_points_the_wrong_way_turns_the_scores_round():
    carrier, view, witness = planted(1)
    assert auc(carrier, left_out_scores(view, -witness)) < 0.01
    assert auc(carrier, left_out_scores(-view, witness)) > 0.99


def test_scores_do_not_depend_on_units_or_order():
    _, view, witness = planted(2)
    scores, order = left_out_scores(view, witness), torch.randperm(400)
    torch.testing.assert_close(left_out_scores(1000 * view + 7, 0.01 * witness - 3), scores)
    torch.testing.assert_close(left_out_scores(view[order], witness[order]), scores[order])


@pytest.mark.parametrize("place", [0, 1])
def test_a_view_that_tells_nothing_spoils_none_that_does(place):
    for seed in range(5):
        carrier, view, witness = planted(seed)
        views = [draws(100 + seed)(400, 50)]
        views.insert(place, view)
        assert auc(carrier, combined_scores(views, witness)) > 0.99


def test_a_view_that_contradicts_the_witness_has_no_weight():
    """Where a regression would turn its scores round, the other view decides alone."""
    contradicted = 0
    for seed in range(12):
        _, view, witness = planted(seed)
        views = [view, draws(100 + seed)(400, 50)]
        scores = torch.stack([standardised(left_out_scores(v, witness)) for v in views], 1)
        fitted = torch.linalg.lstsq(scores, standardised(witness)[:, None]).solution[:, 0]
        found = combined_scores(views, witness)
        torch.testing.assert_close(found, scores @ fitted.maximum(torch.zeros(2)))
        contradicted += bool(fitted[1] < 0)
    assert 0 < contradicted < 12


def test_two_views_that_each_see_a_part_of_it_see_more_together():
    carrier, view, witness = planted(3, apart=3.0, known=2.0)
    _, other, _ = planted(4, apart=3.0)
    alone = [auc(carrier, combined_scores([v], witness)) for v in (view, other)]
    assert auc(carrier, combined_scores([view, other], witness)) > max(alone)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_planted_mixture_is_told_apart(share):
    carrier = torch.arange(600) < 600 * share
    found = upper_group(draws(5)(600) + 7 * carrier)
    assert ((found > 0.5) != carrier).sum() <= 3
    assert ((found >= 0) & (found <= 1)).all()
    moved = upper_group(0.01 * (draws(5)(600) + 7 * carrier) - 40)
    torch.testing.assert_close(moved, found, atol=1e-3, rtol=0)


def test_scores_that_are_all_the_same_say_nothing():
    same = torch.full((30,), 2.5, dtype=torch.float64)
    assert (upper_group(same) == 0.5).all()
    assert (standardised(same) == 0).all()
    assert (left_out_scores(torch.ones(30, 4), same) == 0).all()
    assert not Groups(upper_group(same), torch.ones(30) > 0, torch.zeros(30, 2)).carriers.any()


@pytest.mark.parametrize(
    ("clean", "kept"), [(0, 0), (4, 4), (FEWEST, FEWEST), (15, FEWEST), (60, 30), (61, 30)]
)
def test_the_half_of_the_clean_group_that_is_farthest_from_the_carriers_is_trusted(clean, kept):
    scores = draws(6)(80)
    rank = scores.argsort().argsort()
    carrier = torch.where(rank < clean, CLEAN - 0.01, CLEAN).double()
    assert torch.equal(trusted_half(carrier, scores), rank < kept)


def test_groups_tell_what_belongs_to_no_accused_class():
    carrier = torch.tensor([torch.nan, 0.1, CARRIER, CARRIER + 0.01, 1.0], dtype=torch.float64)
    groups = Groups(carrier, torch.ones(5) > 0, torch.zeros(5, 2))
    assert groups.accused.tolist() == [False, True, True, True, True]
    assert groups.carriers.tolist() == [False, False, False, True, True]


def test_log_odds_are_finite_and_keep_the_order():
    rates = torch.linspace(0, 1, 101)
    odds = logit(rates)
    assert odds.isfinite().all()
    assert (odds.diff() > 0).all()
    assert odds[50] == 0


def test_the_picture_shows_beside_the_score_what_varies_most_across_it():
    _, view, witness = planted(7)
    latent = draws(8)(400)
    view += 6 * latent[:, None] * torch.nn.functional.normalize(draws(9)(32), dim=0)
    along, beside = standardised(left_out_scores(view, witness)), across(view, witness)
    assert beside.shape == (400,)
    assert abs(float(along @ beside)) / 400 < 1e-6
    assert torch.corrcoef(torch.stack([beside, latent]))[0, 1].abs() > 0.9


def test_the_picture_draws_nothing():
    """Neither depends on the global stream of random numbers nor moves it."""
    _, view, witness = planted(7)
    pictures = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        pictures.append(across(view, witness))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*pictures)


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (3, 1), (5, 2)])
def test_a_picture_of_few_samples_or_features_is_finite(shape):
    assert across(draws(10)(*shape), draws(11)(shape[0])).isfinite().all()
    assert (across(torch.ones(shape), draws(11)(shape[0])) == 0).all()
