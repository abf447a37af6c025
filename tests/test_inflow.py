"""How many samples a class has taken in, on votes whose answer is known."""

import pytest
import torch

from defense.elixir.config import PUBLISHED_RULE, TargetRule
from defense.elixir.inflow import LabelFlow, inflow
from defense.elixir.sampling import stratified, undecided
from defense.elixir.target_label import target_labels
from defense.elixir.verdict import filter_candidates

WIDTH, TAU = 11, 5


def read_as(origin, given):
    """Votes of samples whose images the victim reads as `given`, and as `origin` once they are purified."""
    votes = origin[:, None].repeat(1, WIDTH)
    votes[:, 0] = given
    return votes


def poisoned(rate, sizes, target=0, drift=0.0, seed=0):
    """Votes and given labels: `rate` of every other class moved into the target, and `drift` of every class drifts to the two next ones."""
    draw, k = torch.Generator().manual_seed(seed), len(sizes)
    origin = torch.arange(k).repeat_interleave(torch.tensor(sizes))
    given = torch.where(torch.rand(len(origin), generator=draw) < rate, target, origin)
    seen = torch.where(
        torch.rand(len(origin), generator=draw) < drift,
        (origin + torch.randint(1, 3, (len(origin),), generator=draw)) % k,
        origin,
    )
    return read_as(seen, given), given


def estimate(votes, labels, classes, part=None):
    """The inflow, from a part (a mask) of the samples or from all."""
    part, sizes = (
        torch.ones_like(labels, dtype=torch.bool) if part is None else part,
        labels.bincount(minlength=classes),
    )
    found = target_labels(
        votes[part], filter_candidates(votes[part], TAU), labels[part], classes, TargetRule(), sizes
    )
    return found.inflow.share, found


def accused(votes, labels, classes):
    """Target labels by the inflow alone."""
    return target_labels(
        votes, filter_candidates(votes, TAU), labels, classes, TargetRule(threshold=1e9)
    ).targets


def test_by_hand():
    """Class 0 of 8 samples loses one to each of 1 and 2, and half of the votes of one to 3; of four others the one that gets most is left out."""
    labels = torch.tensor([0] * 8 + [1] * 10 + [2] * 20 + [3] * 5 + [4] * 7)
    votes = read_as(labels, labels)
    votes[0, 1:], votes[1, 1:], votes[2, 1:6], votes[2, 6] = 1, 2, 3, 9  # 9: no class; 5 of 9 votes
    flow = LabelFlow.of(votes, labels, 5).flow(2 * torch.ones(50, dtype=torch.float64))
    assert torch.allclose(
        flow, torch.tensor([[0, 2, 2, 10 / 9, 0], *[[0] * 5] * 4], dtype=torch.float64)
    )
    taken = inflow(flow, torch.full((5,), 2.0, dtype=torch.float64), 2 * labels.bincount())
    assert taken.share.tolist() == pytest.approx(
        [4 / 74, 0, 0, 0, 0]
    )  # rates 0, .05, .1 and .111, which is left out
    assert taken.unit.tolist()[0] == pytest.approx(2 / 74)
    assert taken.surprise(taken.unit)[0].item() == pytest.approx(
        1 - 2 * torch.e**-1
    )  # two samples or more where one is expected


@pytest.mark.parametrize(
    "sizes", [[400] * 10, [60, 900, 100, 400, 150, 700, 80, 300, 500, 250, 1000, 90]]
)
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_it_estimates_the_share_that_was_poisoned_from_below_whatever_the_sizes(rate, sizes):
    taken, found = estimate(*poisoned(rate, sizes), len(sizes))
    assert 0.5 * rate < taken[0] < 1.05 * rate / (1 - rate)
    assert taken[1:].max() == 0
    assert found.targets == (0,)


def test_a_sample_of_every_class_tells_what_the_whole_set_tells():
    votes, labels = poisoned(0.1, [2000] * 10)
    part = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) < torch.where(
        labels == 0, 0.05, 0.1
    )
    assert estimate(votes, labels, 10, part)[0][0] == pytest.approx(
        estimate(votes, labels, 10)[0][0], rel=0.25
    )


@pytest.mark.parametrize("drift", [0.2, 0.5, 0.9])
def test_drift_to_a_few_classes_does_not_count_and_hides_no_poison(drift):
    taken, found = estimate(*poisoned(0, [300] * 10, drift=drift), 10)
    assert taken.max() == 0
    assert found.judged.inflow.score.max() == 0
    votes, labels = poisoned(0.1, [300] * 10, drift=drift)
    assert estimate(votes, labels, 10)[1].targets == (0,)
    alone = target_labels(
        votes, filter_candidates(votes, TAU), labels, 10, TargetRule(inflow_threshold=None)
    )
    assert drift < 0.5 or alone.targets == ()


def test_what_all_classes_do_alike_is_no_outlier():
    """Noise in all labels, and one backdoor into each class: every class takes in as much."""
    draw = torch.Generator().manual_seed(2)
    origin = torch.randint(8, (4000,), generator=draw)
    noisy = torch.where(
        torch.rand(4000, generator=draw) < 0.3, torch.randint(8, (4000,), generator=draw), origin
    )
    taken, found = estimate(read_as(origin, noisy), noisy, 8)
    assert taken.min() > 0.02
    assert found.judged.inflow.score.max() < 4
    shifted = torch.where(torch.rand(4000, generator=draw) < 0.1, (origin + 1) % 8, origin)
    assert estimate(read_as(origin, shifted), shifted, 8)[1].targets == ()


def test_it_does_not_depend_on_the_order_of_samples_or_classes():
    votes, labels = poisoned(0.05, [100, 200, 300, 150, 250, 120], drift=0.2)
    mixed, renamed = torch.randperm(len(labels)), torch.randperm(6)
    taken = estimate(votes, labels, 6)[0]
    assert torch.allclose(estimate(votes[mixed], labels[mixed], 6)[0], taken, atol=1e-12)
    assert torch.allclose(
        estimate(renamed[votes], renamed[labels], 6)[0][renamed], taken, atol=1e-12
    )


def test_classes_that_are_empty_alone_or_two():
    votes, labels = poisoned(0.1, [200, 300, 0, 250, 200, 0, 300])
    taken, found = estimate(votes, labels, 7)
    assert taken[[2, 5]].tolist() == [0, 0]
    assert found.judged.inflow.score[[2, 5]].tolist() == [0, 0]
    assert found.targets == (0,)
    for few in (1, 2, 3, 4):  # drift and poison look alike there
        assert estimate(*poisoned(0.1 * (few > 1), [50] * few), few)[0].tolist() == [0] * few
    one = torch.tensor([3])
    assert estimate(read_as(one, one), one, 5)[0].tolist() == [0] * 5


def test_rounds_that_ended_early_weigh_as_much_as_whole_ones():
    votes, labels = poisoned(0.1, [200] * 6)
    short = votes.clone()
    short[:, WIDTH // 2 :] = -1
    assert torch.allclose(estimate(short, labels, 6)[0], estimate(votes, labels, 6)[0])


def test_the_published_rule_knows_nothing_of_it():
    votes, labels = poisoned(0.1, [300] * 10, drift=0.9)
    candidates = filter_candidates(votes, TAU)
    found, plain = (
        target_labels(votes, candidates, labels, 10, rule)
        for rule in (TargetRule(), TargetRule(inflow_threshold=None))
    )
    published = target_labels(votes, candidates, labels, 10, PUBLISHED_RULE)
    assert found.targets == (0,)
    assert plain.targets == ()
    assert published.judged.inflow.threshold == torch.inf
    assert torch.equal(found.judged.discrepancy.score, plain.judged.discrepancy.score)
    assert torch.equal(found.inflow.share, published.inflow.share)


def drifting(sizes, rates, spread, seed):
    """Votes and labels of a clean set: a class's samples leave it at its rate, each of its own kind of neighbours (Dirichlet) as often."""
    draw, k = torch.Generator().manual_seed(seed), len(sizes)
    labels = torch.arange(k).repeat_interleave(torch.tensor(sizes))
    to = torch.rand(k, k, generator=draw).log().neg() ** (1 / spread) * (1 - torch.eye(k))
    moves = torch.rand(len(labels), generator=draw) < rates[labels]
    seen = torch.where(moves, torch.multinomial(to[labels], 1, generator=draw).flatten(), labels)
    return read_as(seen, labels), labels


@pytest.mark.parametrize(("classes", "each"), [(5, 16), (5, 64), (10, 64), (10, 256), (43, 64)])
def test_clean_sets_are_seldom_accused(classes, each):
    """Classes drift at very different rates, most to a few neighbours. Of 100 such sets at most 15 are flagged by the inflow."""
    flagged = 0
    for seed in range(100):
        rates = (
            0.15
            * torch.exp(0.5 * torch.randn(classes, generator=torch.Generator().manual_seed(seed)))
        ).clamp(max=0.9)
        votes, labels = drifting([each] * classes, rates, 0.5, seed)
        flagged += bool(accused(votes, labels, classes))
    assert flagged <= 15


def test_what_few_samples_do_is_chance():
    """Three samples of one class that leave for three others prove nothing where all else stays; twenty that leave for all others do."""
    votes, labels = drifting([64] * 10, torch.zeros(10), 1.0, 0)
    votes[[0, 1, 2], 1:] = torch.tensor([[3], [5], [7]])
    assert estimate(votes, labels, 10)[1].targets == ()
    votes[torch.arange(20), 1:] = (1 + torch.arange(20) % 9)[:, None]
    assert estimate(votes, labels, 10)[1].targets == (0,)


def test_classes_that_drift_far_more_than_most_do_not_stand_apart_from_each_other():
    votes, labels = drifting([400] * 30, 0.6 * 0.8 ** torch.arange(30), 3.0, 1)
    found = estimate(votes, labels, 30)[1]
    assert (found.judged.inflow.score > 4).sum() >= 3
    assert accused(votes, labels, 30) == ()


def doubly_poisoned(first, second, sizes, drift):
    """Votes and labels with backdoors into class 0 and, of other samples, into class 5; and the labels without the first."""
    votes, labels = poisoned(0, sizes, drift=drift)
    draw = torch.rand(len(labels), generator=torch.Generator().manual_seed(9))
    labels = torch.where(draw < second, 5, labels)
    both = torch.where(draw > 1 - first, 0, labels)
    votes[:, 0] = both
    return votes, both, labels


def test_two_backdoors_are_found_at_once():
    votes, labels, _ = doubly_poisoned(0.1, 0.06, [300] * 12, drift=0.2)
    assert accused(votes, labels, 12) == (0, 5)


@pytest.mark.parametrize(("classes", "small"), [(10, 0.02), (43, 0.005)])
def test_a_backdoor_much_smaller_than_another_is_found_once_that_one_is_gone(classes, small):
    votes, labels, mended = doubly_poisoned(0.1, small, [500] * classes, drift=0.2)
    assert 0 in accused(votes, labels, classes)
    assert accused(votes, mended, classes) == (5,)


def test_a_class_close_to_the_limit_is_undecided_until_the_sample_has_grown():
    def sampled(rate, first):
        """Whether class 0 is flagged, and which classes are undecided, by `first` samples of each of 10 classes that drift."""
        votes, labels = poisoned(rate, [2000] * 10, drift=0.3)
        part = stratified(labels, torch.full((10,), first), seed=1)
        votes, labels, sizes = votes[part], labels[part], labels.bincount()
        candidates = filter_candidates(votes, TAU)
        rule = TargetRule(threshold=1e9)  # the inflow alone
        found = target_labels(votes, candidates, labels, 10, rule, sizes)
        return found.targets, undecided(
            votes, candidates, labels, sizes, found, rule, 0.02, seed=0
        ).nonzero().flatten().tolist()

    assert sampled(0, 64) == ((), [])
    assert sampled(0.03, 64) == ((0,), [])
    assert sampled(0.01, 64)[1] == [0]
    assert sampled(0.015, 64) == ((0,), [0])
    assert sampled(0.01, 600) == ((0,), [])
