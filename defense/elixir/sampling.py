"""Targets first (ours): how many samples must be purified to know the target labels.

A sample of every class is purified, in a random order that the seed fixes; it grows, in the classes
that are undecided, until the decision is settled. A class is undecided while the verdict on
it comes out differently in more than `error` of the bootstrap resamples (Efron, "Bootstrap Methods:
Another Look at the Jackknife", 1979). Each sample is counted Poisson(1) times, drawn towards once
as the sample comes to be the class: by (1 - f)^1/2 where it is the share f of it (Rao and Wu,
"Resampling Inference With Complex Survey Data", 1988), so that nothing about a class that is whole
is left to chance. Where the verdict on such a class is undecided, it is the others, with which it
is compared, that must grow.

It does not see what a sample has none of: a class of which the share p was poisoned shows no poison
in 64 samples with probability (1 - p)^64, that is .037 for p = .05 and .001 for p = .1.
"""

import torch
from torch import Tensor

from defense.elixir.config import SAMPLE_FIRST, PurifyConfig, TargetRule
from defense.elixir.inflow import LabelFlow
from defense.elixir.target_label import Discrepancy, class_share, discrepancy, judge, support
from defense.elixir.verdict import Candidates
from utils.randomness import keyed_generator

RESAMPLES = 400
TOGETHER = 8  # resamples at a time; each holds a number for every sample, three times over


def smallest(labels: Tensor, config: PurifyConfig) -> int:
    """The images of a set with `labels` int64 (N,) that are purified at least."""
    if not getattr(config, "target_first", False):
        return len(labels)
    return int(labels.bincount().clamp(max=SAMPLE_FIRST).sum())


def expected_images(labels: Tensor, config: PurifyConfig) -> int:
    """About how many will be purified: the sample, and one class if it is a target label."""
    return min(len(labels), smallest(labels, config) + len(labels) // len(labels.unique()))


def stratified(labels: Tensor, sizes: Tensor, seed: int) -> Tensor:
    """Sorted indices of the first `sizes[c]` samples of every class c, in a random order.

    A larger sample holds the smaller. Where a class of `labels` int64 (N,) has fewer than `sizes`
    int64 (K,) says, all are taken; `seed` is the key of the order.
    """
    order = torch.randperm(len(labels), generator=keyed_generator(seed, "sample"))
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount(minlength=len(sizes))
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[rank < sizes[labels[by_class]]].sort().values


def undecided(
    votes: Tensor,
    candidates: Candidates,
    labels: Tensor,
    sizes: Tensor,
    found: Discrepancy,
    rule: TargetRule,
    error: float,
    seed: int,
) -> Tensor:
    """bool (K,): the classes of which more samples are needed, none of them whole.

    Resamples turn over too often their own verdict, or that of a class that is whole.

    Args:
        votes, candidates, labels, sizes, rule: as in `target_labels`.
        found: the verdicts on these samples.
        error: share of resamples in which a verdict may differ.
        seed: key of the resamples.
    """
    generator, classes = keyed_generator(seed, "resample", len(labels)), len(sizes)
    share = labels.bincount(minlength=classes) / sizes.clamp(min=1)
    own, total = support(votes, candidates, labels, classes)
    spread, leaving = (1 - share[labels]).sqrt(), LabelFlow.of(votes, labels, classes)
    flips = torch.zeros(classes, dtype=torch.float64)
    for first in range(0, RESAMPLES, TOGETHER):
        shape = min(TOGETHER, RESAMPLES - first), len(labels)
        times = torch.poisson(torch.ones(shape, dtype=torch.float64), generator=generator)
        counts = 1 + (times - 1) * spread
        zeros = torch.zeros(shape[0], classes, dtype=torch.float64)
        parts = (counts, counts * own, counts * total)
        size, kept, cast = (zeros.index_add(1, labels, part) for part in parts)
        metrics = discrepancy(class_share(kept, cast, size, votes.shape[1], rule.evidence_prior))
        for metric, count in zip(metrics, counts):
            judged = judge(metric, leaving.inflow(sizes, count), rule)
            flips += judged.outlies != found.judged.outlies
    open_, whole = flips > error * RESAMPLES, share == 1
    return (open_ | (open_ & whole).any()) & ~whole
