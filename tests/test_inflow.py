"""How many samples a class has taken in, on votes whose answer is known."""
import pytest
import torch

from defense.inflow import Leaving, inflow
from defense.sampling import stratified, undecided
from defense.target_label import PUBLISHED_RULE, TargetRule, target_labels
from defense.verdict import filter_candidates

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
    seen = torch.where(torch.rand(len(origin), generator=draw) < drift, (origin + torch.randint(1, 3, (len(origin),), generator=draw)) % k, origin)
    return read_as(seen, given), given


def estimate(votes, labels, classes, part=None):
    """The inflow, from a part (a mask) of the samples or from all."""
    part, sizes = torch.ones_like(labels, dtype=torch.bool) if part is None else part, labels.bincount(minlength=classes)
    found = target_labels(votes[part], filter_candidates(votes[part], TAU), labels[part], classes, TargetRule(), sizes)
    return found.inflow, found


def test_by_hand():
    """Class 0 of 8 samples loses one to each of 1 and 2, and half of the votes of one to 3; of three others the one that gets most is left out."""
    labels = torch.tensor([0] * 8 + [1] * 10 + [2] * 20 + [3] * 5)
    votes = read_as(labels, labels)
    votes[0, 1:], votes[1, 1:], votes[2, 1:6], votes[2, 6] = 1, 2, 3, 9          # 9: no class; 5 of 9 votes
    flow = Leaving.of(votes, labels, 4).flow(torch.ones(43, dtype=torch.float64))
    assert torch.allclose(flow, torch.tensor([[0, 1, 1, 5 / 9], [0] * 4, [0] * 4, [0] * 4], dtype=torch.float64))
    assert inflow(flow, labels.bincount()).tolist() == pytest.approx([2 / 30, 0, 0, 0])   # rates .1, .05 and .111


@pytest.mark.parametrize("sizes", [[400] * 10, [60, 900, 100, 400, 150, 700, 80, 300, 500, 250, 1000, 90]])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_it_estimates_the_share_that_was_poisoned_from_below_whatever_the_sizes(rate, sizes):
    taken, found = estimate(*poisoned(rate, sizes), len(sizes))
    assert 0.5 * rate < taken[0] < 1.05 * rate / (1 - rate) and taken[1:].max() == 0 and found.targets == (0,)


def test_a_sample_of_every_class_tells_what_the_whole_set_tells():
    votes, labels = poisoned(0.1, [2000] * 10)
    part = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) < torch.where(labels == 0, 0.05, 0.1)
    assert estimate(votes, labels, 10, part)[0][0] == pytest.approx(estimate(votes, labels, 10)[0][0], rel=0.25)


@pytest.mark.parametrize("drift", [0.2, 0.5, 0.9])
def test_drift_to_a_few_classes_does_not_count_and_hides_no_poison(drift):
    taken, found = estimate(*poisoned(0, [300] * 10, drift=drift), 10)
    assert taken.max() == 0 and found.inflow_score.max() == 0
    votes, labels = poisoned(0.1, [300] * 10, drift=drift)
    assert estimate(votes, labels, 10)[1].targets == (0,)
    alone = target_labels(votes, filter_candidates(votes, TAU), labels, 10, TargetRule(inflow_threshold=None))
    assert drift < 0.5 or alone.targets == ()


def test_what_all_classes_do_alike_is_no_outlier():
    """Noise in all labels, and one backdoor into each class: every class takes in as much."""
    draw = torch.Generator().manual_seed(2)
    origin = torch.randint(8, (4000,), generator=draw)
    noisy = torch.where(torch.rand(4000, generator=draw) < 0.3, torch.randint(8, (4000,), generator=draw), origin)
    taken, found = estimate(read_as(origin, noisy), noisy, 8)
    assert taken.min() > 0.02 and found.inflow_score.max() < 4
    shifted = torch.where(torch.rand(4000, generator=draw) < 0.1, (origin + 1) % 8, origin)
    assert estimate(read_as(origin, shifted), shifted, 8)[1].targets == ()


def test_it_does_not_depend_on_the_order_of_samples_or_classes():
    votes, labels = poisoned(0.05, [100, 200, 300, 150, 250, 120], drift=0.2)
    mixed, renamed = torch.randperm(len(labels)), torch.randperm(6)
    taken = estimate(votes, labels, 6)[0]
    assert torch.allclose(estimate(votes[mixed], labels[mixed], 6)[0], taken, atol=1e-12)
    assert torch.allclose(estimate(renamed[votes], renamed[labels], 6)[0][renamed], taken, atol=1e-12)


def test_classes_that_are_empty_alone_or_two():
    votes, labels = poisoned(0.1, [200, 300, 0, 250, 200, 0, 300])
    taken, found = estimate(votes, labels, 7)
    assert taken[[2, 5]].tolist() == [0, 0] and found.inflow_score[[2, 5]].tolist() == [0, 0] and found.targets == (0,)
    assert estimate(*poisoned(0.1, [50, 50]), 2)[1].inflow_score.max() < 4          # of two, neither is the odd one
    assert estimate(*poisoned(0, [9]), 1)[0].tolist() == [0]
    one = torch.tensor([3])
    assert estimate(read_as(one, one), one, 5)[0].tolist() == [0] * 5


def test_rounds_that_ended_early_weigh_as_much_as_whole_ones():
    votes, labels = poisoned(0.1, [200] * 6)
    short = votes.clone()
    short[:, WIDTH // 2:] = -1
    assert torch.allclose(estimate(short, labels, 6)[0], estimate(votes, labels, 6)[0])


def test_the_published_rule_knows_nothing_of_it():
    votes, labels = poisoned(0.1, [300] * 10, drift=0.9)
    candidates = filter_candidates(votes, TAU)
    found, plain = (target_labels(votes, candidates, labels, 10, rule) for rule in (TargetRule(), TargetRule(inflow_threshold=None)))
    published = target_labels(votes, candidates, labels, 10, PUBLISHED_RULE)
    assert found.targets == (0,) and plain.targets == () and published.inflow_limit == torch.inf
    assert torch.equal(found.score, plain.score) and torch.equal(found.inflow, published.inflow)


def test_a_class_close_to_the_limit_is_undecided_until_the_sample_has_grown():
    def sampled(rate, first):
        """Whether class 0 is flagged, and which classes are undecided, by `first` samples of each of 10 classes that drift."""
        votes, labels = poisoned(rate, [2000] * 10, drift=0.3)
        part = stratified(labels, torch.full((10,), first), seed=1)
        votes, labels, sizes = votes[part], labels[part], labels.bincount()
        candidates, partly = filter_candidates(votes, TAU), torch.zeros(10, dtype=torch.bool)
        rule = TargetRule(threshold=1e9)                                    # the inflow alone
        found = target_labels(votes, candidates, labels, 10, rule, sizes)
        return found.targets, undecided(votes, candidates, labels, sizes, partly, found, rule, 0.02, seed=0).nonzero().flatten().tolist()

    assert sampled(0, 64) == ((), []) and sampled(0.03, 64) == ((0,), [])
    assert sampled(0.005, 64)[1] == [0] and sampled(0.01, 64)[1] == [0] and sampled(0.01, 600) == ((0,), [])
