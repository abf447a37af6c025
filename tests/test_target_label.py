"""Target-label detection: golden values of the published rule, its edge cases, and laws of the mended one."""

import itertools
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from defense.elixir.config import PUBLISHED_RULE, TargetRule
from defense.elixir.outliers import robust_scores
from defense.elixir.target_label import label_shares, target_labels
from defense.elixir.verdict import filter_candidates

GOLDEN = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "golden.json").read_text())["target_detection"]
}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def detect(pools, rule=PUBLISHED_RULE, tau=5):
    """Detection on a list per class of the votes of its samples."""
    votes = torch.tensor([row for pool in pools for row in pool])
    labels = torch.tensor([c for c, pool in enumerate(pools) for _ in pool])
    return target_labels(votes, filter_candidates(votes, tau), labels, len(pools), rule)


def drift(label, to, gone, width=10):
    """Votes of a sample of class `label`, `gone` of which went to class `to`; all are kept where tau is 1."""
    return [label] * (width - gone) + [to] * gone


def numbers(text):
    """The list in a golden string such as "metrics: [1.9, 0.4]" or "scores: [9.7 0.7]"."""
    return [float(number) for number in text.split("[")[1].rstrip("]").replace(",", " ").split()]


def random_case(seed=0, n=600, classes=7, width=21):
    """Votes, candidates and labels; each class drifts at a rate of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    stray = torch.randint(classes, (n, width), generator=generator)
    moves = (
        torch.rand(n, width, generator=generator) < torch.linspace(0.05, 0.6, classes)[labels, None]
    )
    votes = torch.where(moves, stray, labels[:, None])
    return votes, filter_candidates(votes, 3), labels


@pytest.mark.parametrize("name", ["one_target", "identical_classes_mad0"])
def test_published_rule_agrees_with_golden(name):
    case, found = GOLDEN[name], detect(GOLDEN[name]["pools"])
    np.testing.assert_allclose(found.metric, numbers(case["metrics"]), rtol=1e-14)
    np.testing.assert_allclose(found.judged.discrepancy.score, numbers(case["scores"]), atol=1e-8)
    assert list(found.targets) == case["target"]


def test_where_the_published_code_crashes_a_class_without_evidence_has_metric_0():
    found = detect(GOLDEN["class_without_anomaly_crashes"]["pools"])
    assert found.evidence.tolist() == [1, 1, 1, 1, 0, 1]
    assert found.metric[4] == 0
    assert not found.metric[4].signbit()
    assert found.share[4] == 1
    assert found.judged.discrepancy.score.isfinite().all()


def test_the_default_rule_finds_the_golden_target_too():
    assert detect(GOLDEN["one_target"]["pools"], TargetRule()).targets == (0,)


def test_share_by_hand():
    votes = torch.tensor(
        [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2], [1, 0, 0, 2, 2], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    )
    labels = torch.tensor([0, 0, 0, 1, 1])  # kept: all; 0111; all; all; all
    shares = label_shares(votes, filter_candidates(votes, 2), labels, 3, evidence_prior=0.0)
    assert shares.share.tolist() == [3 / 9, 4 / 5, 1]
    assert shares.evidence.tolist() == [2, 1, 0]
    assert shares.size.tolist() == [3, 2, 0]
    prior = label_shares(votes, filter_candidates(votes, 2), labels, 3, evidence_prior=0.2)
    assert prior.share.tolist() == [(3 + 3) / (9 + 3), (4 + 2) / (5 + 2), 1]


def test_votes_for_classes_that_do_not_exist_are_left_out():
    votes = torch.tensor([[0, 9, 9, 1, 1, 0]])
    assert label_shares(
        votes, filter_candidates(votes, 1), torch.tensor([0]), 2, 0.0
    ).share.tolist() == [0.5, 1]


def test_the_prior_draws_every_metric_towards_0():
    votes, candidates, labels = random_case()
    priors = (0.0, 0.01, 0.05, 0.2, 1.0, 100.0)
    metrics = [-label_shares(votes, candidates, labels, 7, prior).share.log() for prior in priors]
    assert all((after < before).all() for before, after in itertools.pairwise(metrics))
    assert metrics[-1].max() < 0.01


def test_the_prior_weighs_most_where_evidence_is_scarce():
    pools = [
        [drift(c, 2, 9)] * moved + [[c] * 10] * (100 - moved) for c, moved in ((0, 1), (1, 50))
    ] + [[[2] * 10]]
    assert detect(pools).metric.tolist() == pytest.approx([math.log(10), math.log(10), 0])
    found = detect(pools, TargetRule(evidence_prior=0.05))
    assert found.share.tolist() == pytest.approx([(1 + 50) / (10 + 50), (50 + 50) / (500 + 50), 1])


def test_a_share_of_0_is_infinite_as_published_and_finite_with_a_prior():
    pools = [[[1] * 9 + [2]]] + [[drift(c, 0, 3)] for c in (1, 2, 3)]
    published, mended = detect(pools, tau=1), detect(pools, TargetRule(), tau=1)
    assert published.metric[0] == math.inf
    assert published.targets == (0,)
    assert mended.metric.isfinite().all()
    assert mended.targets == (0,)


@pytest.mark.parametrize("two_sided", [True, False])
def test_an_infinite_median_flags_nobody(two_sided):
    pools = [[[1] * 9 + [2]], [[2] * 9 + [0]], [drift(2, 0, 3)], [drift(3, 0, 4)]]
    found = detect(pools, replace(PUBLISHED_RULE, two_sided=two_sided), tau=1)
    assert found.judged.discrepancy.score.isnan().all()
    assert found.targets == ()


def test_without_deviation_and_floor_any_difference_counts():
    pools = [[drift(c, (c + 1) % 5, 3 + (c == 0))] for c in range(5)]
    found = detect(pools, tau=1)
    assert found.targets == (0,)
    assert found.judged.discrepancy.score[0] == pytest.approx(math.log(7 / 6) / 1.4826 / 1e-6)
    assert detect(pools, replace(PUBLISHED_RULE, mad_floor=0.2), tau=1).targets == ()


def test_two_sided_flags_a_clean_class_and_one_sided_does_not():
    metric = torch.tensor([0.9, 1.0, 1.1, 1.05, 0.95, 0.0, 3.0], dtype=torch.float64)
    two, one = (
        robust_scores(metric, metric >= 0, 2.0, 0.0, two_sided=side).score for side in (True, False)
    )
    assert (two > 2).nonzero().flatten().tolist() == [5, 6]
    assert (one > 2).nonzero().flatten().tolist() == [6]
    assert torch.equal(two, one.abs())


def test_a_score_must_exceed_the_threshold():
    pools = GOLDEN["one_target"]["pools"]
    score = detect(pools).judged.discrepancy.score[0].item()
    assert detect(pools, replace(PUBLISHED_RULE, threshold=score)).targets == ()
    assert detect(pools, replace(PUBLISHED_RULE, threshold=math.nextafter(score, 0))).targets == (
        0,
    )


@pytest.mark.parametrize("classes", [1, 2, 5, 8])
def test_scores_use_the_middle_of_two_as_numpy_does(classes):
    metric = torch.rand(
        classes, dtype=torch.float64, generator=torch.Generator().manual_seed(classes)
    )
    centre = np.median(metric)
    expected = (metric - centre) / 1.4826 / (np.median(abs(metric - centre)) + 1e-6)
    found = robust_scores(metric, metric >= 0, 2.0, floor=0.0).score
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_absent_classes_change_nothing():
    votes, candidates, labels = random_case()
    plain = target_labels(votes, candidates, labels, 7, PUBLISHED_RULE)
    wider = target_labels(votes, candidates, labels, 20, PUBLISHED_RULE)
    assert wider.targets == plain.targets
    assert torch.equal(wider.judged.discrepancy.score[:7], plain.judged.discrepancy.score)
    for values in (wider.metric, wider.judged.discrepancy.score, wider.evidence):
        assert (values[7:] == 0).all()


@pytest.mark.parametrize("rule", [PUBLISHED_RULE, TargetRule()])
def test_the_order_of_samples_and_the_names_of_labels_do_not_matter(rule):
    votes, candidates, labels = random_case()
    plain = target_labels(votes, candidates, labels, 7, rule)
    order, names = torch.randperm(len(votes)), torch.tensor([3, 6, 0, 5, 1, 4, 2])
    shuffled = target_labels(
        votes[order], filter_candidates(votes[order], 3), labels[order], 7, rule
    )
    renamed = target_labels(names[votes], candidates, names[labels], 7, rule)
    assert torch.equal(shuffled.metric, plain.metric)
    assert shuffled.targets == plain.targets
    assert torch.equal(renamed.metric[names], plain.metric)
    assert torch.equal(renamed.judged.discrepancy.score[names], plain.judged.discrepancy.score)
    assert renamed.targets == tuple(sorted(names[list(plain.targets)].tolist()))


def test_nothing_moved_flags_nobody():
    found = detect([[[c] * 10] * 4 for c in range(5)], TargetRule())
    assert found.targets == ()
    assert (found.metric == 0).all()
    assert (found.evidence == 0).all()


def test_unsuitable_input_is_refused():
    votes, candidates, labels = random_case()
    with pytest.raises(ValueError, match="0..4"):
        target_labels(votes, candidates, labels, 5, TargetRule())
    with pytest.raises(ValueError, match="same samples"):
        target_labels(votes, candidates, labels[:-1], 7, TargetRule())
    with pytest.raises(ValueError, match="without samples"):
        target_labels(votes[:0], filter_candidates(votes[:0], 3), labels[:0], 7, TargetRule())
    with pytest.raises(ValueError, match="0 or more"):
        TargetRule(mad_floor=-1)
