"""Targets first (ours): how many samples must be purified to know the target labels.

Only samples whose given label is a target label are ever changed, so most of a set need not be
purified at all. A sample of every class is, in a random order that the seed fixes; it grows, in the
classes that are undecided, until the decision is settled. A class is undecided while the verdict on
it comes out differently in more than `error` of the bootstrap resamples (Efron, "Bootstrap Methods:
Another Look at the Jackknife", 1979). Each sample is counted Poisson(1) times, drawn towards once
as the sample comes to be the class: by (1 - f)^1/2 where it is the share f of it (Rao and Wu,
"Resampling Inference With Complex Survey Data", 1988), so that nothing about a class that is whole
is left to chance. Where the verdict on such a class is undecided, it is the others, with which it
is compared, that must grow.

The bootstrap does not see what a sample has none of. A class of which the share p was poisoned
shows no poison in `first` samples with probability (1 - p)^first: at 64 samples .037 for p = .05,
.001 for p = .1.
"""

from __future__ import annotations

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


def stratified(labels: Tensor, sizes: Tensor, seed: int) -> Tensor:
    """Sorted indices of the first `sizes[c]` samples of every class c, in a random order.

    A larger sample holds the smaller.

    Args:
        labels: int64 (N,), 0..K-1.
        sizes: int64 (K,); where a class has fewer samples, all are taken.
        seed: key of the order.
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
    """Classes of which more samples are needed, since resamples turn a verdict over too often.

    Their own verdict, or that of a class that is whole.

    Args:
        votes: int64 (S, 1+nm) of the samples purified so far.
        candidates: of the same samples.
        labels: int64 (S,), their given labels.
        sizes: int64 (K,), samples of each class in the whole set.
        found: the verdicts on all S samples.
        rule: how verdicts are made.
        error: share of resamples in which a verdict may differ.
        seed: key of the resamples.

    Returns:
        bool (K,), none of them whole.
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
        size, kept, cast = (
            _by_class(part, labels, classes) for part in (counts, counts * own, counts * total)
        )
        metrics = discrepancy(class_share(kept, cast, size, votes.shape[1], rule.evidence_prior))
        for metric, drawn, count in zip(metrics, size, counts):
            judged = judge(metric, leaving.inflow(sizes, count), drawn > 0, rule)
            flips += judged.outlies != found.is_target
    open_, whole = flips > error * RESAMPLES, share == 1
    return (open_ | (open_ & whole).any()) & ~whole


def _by_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """float64 (R, K): values float64 (R, S) summed over the samples of each class."""
    return torch.zeros(len(values), num_classes, dtype=torch.float64).index_add_(1, labels, values)
