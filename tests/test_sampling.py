"""Which samples are purified first, and when they have told enough."""

import pytest
import torch
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode

from defense.elixir import sampling
from defense.elixir.config import PUBLISHED_RULE, TargetRule
from defense.elixir.inflow import LabelFlow
from defense.elixir.sampling import TOGETHER, stratified, undecided
from defense.elixir.target_label import class_share, discrepancy, judge, support, target_labels
from defense.elixir.verdict import filter_candidates
from utils.randomness import keyed_generator

RULE, TAU, K = TargetRule(), 3, 6
RESAMPLES = 100


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(sampling, "RESAMPLES", RESAMPLES)


class Made(TorchFunctionMode):
    """Within it, `numels` tells the elements of every tensor that is made and not a view of another."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numels.append(x.numel())
        return found


def test_a_sample_has_the_same_number_of_every_class_and_grows_by_itself():
    labels = torch.tensor([0] * 50 + [1] * 5 + [3] * 20)[
        torch.randperm(75, generator=torch.Generator().manual_seed(1))
    ]
    small, large = (stratified(labels, torch.full((4,), size), seed=3) for size in (8, 16))
    assert labels[small].bincount(minlength=4).tolist() == [8, 5, 0, 8]
    assert labels[large].bincount(minlength=4).tolist() == [16, 5, 0, 16]
    assert torch.isin(small, large).all()
    assert (small.diff() > 0).all()
    assert torch.equal(small, stratified(labels, torch.full((4,), 8), 3))
    assert not torch.equal(small, stratified(labels, torch.full((4,), 8), 4))
    assert labels[stratified(labels, torch.tensor([0, 2, 9, 99]), 3)].bincount(
        minlength=4
    ).tolist() == [0, 2, 0, 20]


def test_every_sample_of_a_class_is_as_likely():
    labels = torch.zeros(40, dtype=torch.int64)
    drawn = torch.cat(
        [stratified(labels, torch.tensor([10]), seed) for seed in range(800)]
    ).bincount(minlength=40)
    assert drawn.sum() == 8000
    assert (drawn - 200).abs().max() < 60


def votes_of(moved, per_class=40):
    """Votes of `per_class` samples of K classes; moved[c] of class c leave it for the next class."""
    labels = torch.arange(K).repeat_interleave(per_class)
    leaves = torch.arange(per_class).repeat(K) < torch.tensor(moved).repeat_interleave(per_class)
    votes = labels[:, None].repeat(1, 9)
    votes[leaves, 1:] = (labels[leaves, None] + 1) % K
    return votes, labels


def open_classes(moved, whole=(), error=0.02, per_class=40):
    votes, labels = votes_of(moved, per_class)
    candidates, sizes = (
        filter_candidates(votes, TAU),
        100 * labels.bincount(minlength=K),
    )  # a hundredth of each class is known
    sizes[list(whole)] //= 100
    found = target_labels(votes, candidates, labels, K, RULE)
    return found.targets, undecided(
        votes, candidates, labels, sizes, found, RULE, error, seed=0
    ).nonzero().flatten().tolist()


def least_flagged(per_class=40):
    """How many samples of class 0 must move, where no other moves, for it to be a target label."""
    for n in range(per_class):
        votes, labels = votes_of([n, 0, 0, 0, 0, 0], per_class)
        if target_labels(votes, filter_candidates(votes, TAU), labels, K, RULE).targets:
            return n


def test_clear_verdicts_are_settled(monkeypatch):
    monkeypatch.setattr(sampling, "RESAMPLES", 400)
    assert open_classes([0] * K) == ((), [])
    assert open_classes([30, 0, 0, 0, 0, 0]) == ((0,), [])
    assert open_classes([40, 1, 0, 0, 1, 0], per_class=64) == ((0,), [])


def test_a_class_close_to_the_threshold_is_undecided_until_it_is_purified_whole():
    edge = least_flagged()
    for n in (edge - 1, edge):
        assert open_classes([n, 0, 0, 0, 0, 0])[1] == [0]
        assert open_classes([n, 0, 0, 0, 0, 0], whole=[0])[1] == []
    assert open_classes([edge, 0, 0, 0, 0, 0], error=0.99)[1] == []


def test_what_is_left_to_chance_shrinks_with_what_is_left_of_the_class():
    """Samples without replacement of a class of 200 flip as often as resamples say."""
    draw, edge = torch.Generator().manual_seed(2), least_flagged(per_class=200)
    votes, labels = votes_of([edge + 8, 0, 0, 0, 0, 0], per_class=200)
    sizes = labels.bincount()
    whole = target_labels(votes, filter_candidates(votes, TAU), labels, K, RULE).targets
    for seen, expected in ((50, True), (194, False)):
        flipped, asked = 0, 0
        for _ in range(20):
            rows = torch.cat([torch.randperm(200, generator=draw)[:seen], torch.arange(200, 1200)])
            part = filter_candidates(votes[rows], TAU)
            found = target_labels(votes[rows], part, labels[rows], K, RULE, sizes)
            short = undecided(votes[rows], part, labels[rows], sizes, found, RULE, 0.02, seed=0)
            flipped += found.targets != whole
            asked += bool(short[0])
        assert (flipped > 0) == expected, (seen, flipped)
        assert (asked > 10) == expected, (seen, asked)


def test_where_a_whole_class_is_undecided_the_others_grow():
    """Its own votes are all there, but the classes that it is compared with are known from a few samples."""
    sizes, asked = [40, 4000, 4000, 4000, 4000, 4000], 0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        moved = [12] + [int((torch.rand(40, generator=draw) < 0.1).sum()) for _ in range(K - 1)]
        votes, labels = votes_of(moved)
        candidates = filter_candidates(votes, TAU)
        rule = TargetRule(inflow_threshold=None)
        found = target_labels(votes, candidates, labels, K, rule)
        short = undecided(votes, candidates, labels, torch.tensor(sizes), found, rule, 0.02, seed=0)
        assert not short[0]
        alone = undecided(votes, candidates, labels, torch.tensor(sizes), found, rule, 0.9, seed=0)
        asked += short[1:].all() and not alone.any()
    assert asked > 10


def test_a_larger_sample_of_the_same_shares_is_decided_sooner():
    edge = least_flagged()
    assert open_classes([2 * edge, 0, 0, 0, 0, 0])[1] == [0]
    assert open_classes([40 * edge, 0, 0, 0, 0, 0], per_class=800)[1] == []


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_settled_samples_decide_as_the_whole_set(share):
    """Classes of 2,000 of which a share of one was poisoned: of 30 samples that claim to be settled, at most 2 are wrong (error .02)."""
    generator, wrong, settled = torch.Generator().manual_seed(5), 0, 0
    whole, _ = open_classes([int(2000 * share), 4, 2, 0, 6, 0], per_class=2000)
    for _ in range(30):
        draw = [
            int((torch.rand(64, generator=generator) < p).sum())
            for p in (share, 0.002, 0.001, 0, 0.003, 0)
        ]
        found, open_ = open_classes(draw, per_class=64)
        settled += not open_
        wrong += not open_ and found != whole
    assert wrong <= 2
    assert settled >= (20 if share == 0.3 else 0)


def drifting(seed, classes, samples, error):
    """A made-up sample: (votes, candidates, labels, sizes, verdicts, rule, error, seed), some classes with poison, all with noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    moved = draw(samples) < (0.4 * draw(classes) * draw(1))[labels]
    votes = torch.where(
        moved[:, None],
        torch.randint(0, classes, (samples, 1), generator=generator),
        labels[:, None],
    ).repeat(1, 9)
    votes = torch.where(
        draw(samples, 9) < 0.05, torch.randint(0, classes, (samples, 9), generator=generator), votes
    )
    sizes = labels.bincount(minlength=classes) * torch.randint(
        1, 5, (classes,), generator=generator
    )  # some are whole
    rule, candidates = (RULE, PUBLISHED_RULE)[seed % 2], filter_candidates(votes, TAU)
    return (
        votes,
        candidates,
        labels,
        sizes,
        target_labels(votes, candidates, labels, classes, rule, sizes),
        rule,
        error,
        seed,
    )


def undecided_at_once(votes, candidates, labels, sizes, found, rule, error, seed):
    """The same from all resamples at once, summed by a matrix of which sample has which class."""
    generator, member = (
        keyed_generator(seed, "resample", len(labels)),
        one_hot(labels, len(sizes)).double(),
    )
    share = labels.bincount(minlength=len(sizes)) / sizes.clamp(min=1)
    times = torch.poisson(
        torch.ones(RESAMPLES, len(labels), dtype=torch.float64), generator=generator
    )
    counts = 1 + (times - 1) * (1 - share[labels]).sqrt()
    own, total = (
        counts @ (member * values[:, None])
        for values in support(votes, candidates, labels, len(sizes))
    )
    size, leaving = counts @ member, LabelFlow.of(votes, labels, len(sizes))
    metrics = discrepancy(class_share(own, total, size, votes.shape[1], rule.evidence_prior))
    flips = sum(
        (judge(metric, leaving.inflow(sizes, count), rule).outlies != found.is_target).double()
        for metric, count in zip(metrics, counts)
    )
    short, whole = flips > error * RESAMPLES, share == 1
    return (short | (short & whole).any()) & ~whole


def test_a_few_resamples_at_a_time_ask_for_the_same_classes_as_all_at_once():
    cases = [
        drifting(seed, classes, samples, error)
        for seed, (classes, samples, error) in enumerate(
            [
                (5, 60, 0.02),
                (6, 200, 0.02),
                (10, 150, 0.2),
                (12, 400, 0.05),
                (20, 500, 0.02),
                (43, 900, 0.1),
                (8, 30, 0.3),
                (10, 640, 0.1),
            ]
        )
    ]
    found = [undecided(*case) for case in cases]
    assert all(torch.equal(one, undecided_at_once(*case)) for one, case in zip(found, cases))
    assert sum(bool(one.any()) and not bool(one.all()) for one in found) >= 3
    assert len({len(one) for one in found}) > 5


def test_nothing_larger_than_the_votes_is_made_of_resamples():
    """Neither a number for each resample and sample, nor for each sample and class."""
    case = drifting(0, classes=60, samples=2000, error=0.02)
    with Made() as made:
        undecided(*case)
    assert made.numels.count(TOGETHER * 2000) >= RESAMPLES // TOGETHER
    assert max(made.numels) <= case[0].numel() < 2000 * 60 < 2000 * RESAMPLES
