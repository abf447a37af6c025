"""How many samples of the other classes a class has taken in, estimated from where its votes go.

A backdoor takes its samples from every class alike, and without the trigger each goes back: the
votes that leave the target class reach all classes, in proportion to their sizes. Clean images that
purification harms drift to the few classes that look like them. So the votes that a class loses are
set against the size of the class that gets them, the classes that get most for their size are left
out, and what the others get is the estimate: between 0 and the share of poison among the other
classes' samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from defense.elixir.outliers import Scores, robust_scores

DRIFT = 1 / 3  # of the classes that votes go to, those left out: where own images drift
FEW = 4  # other classes at least, of which a third is left out
FLOOR = 0.0005  # least median absolute deviation that inflows are told apart by
ALIKE = 1 / 3  # the same as a share of the mean inflow
CHANCE = 0.01  # of a clean set, that any class is flagged for what few samples do
APART = 2.0  # times as much as any other class, flagged classes have taken in


@dataclass(frozen=True)
class LabelFlow:
    """Those votes of S samples that left their given label.

    Attributes:
        labels: int64 (S,), the given labels.
        row: int64 (M,), the sample, 0..S-1.
        cell: int64 (M,), given label * K + the label voted for.
        weight: float64 (M,), 1 / votes cast by the sample's intermediaries.
        num_classes: K.
    """

    labels: Tensor
    row: Tensor
    cell: Tensor
    weight: Tensor
    num_classes: int

    @classmethod
    def of(cls, votes: Tensor, labels: Tensor, num_classes: int) -> LabelFlow:
        """Of votes int64 (S, 1+nm), where the original's does not count, nor any outside 0..K-1."""
        votes = votes[:, 1:]
        cast = (votes >= 0) & (votes < num_classes)
        row, column = (cast & (votes != labels[:, None])).nonzero(as_tuple=True)
        cell, weight = labels[row] * num_classes + votes[row, column], 1 / cast.sum(1)[row].double()
        return cls(labels, row, cell, weight, num_classes)

    def flow(self, counts: Tensor) -> Tensor:
        """float64 (K, K): samples' worth of votes from the given label to another.

        Sample i is counted counts[i] times, float64 (S,).
        """
        cells = torch.zeros(self.num_classes**2, dtype=torch.float64)
        cells.index_add_(0, self.cell, self.weight * counts[self.row])
        return cells.view(self.num_classes, -1)

    def inflow(self, sizes: Tensor, counts: Tensor | None = None) -> Inflow:
        """What the classes of a whole set, int64 `sizes` (K,), have taken in.

        `counts` as in `flow`; None = once each.
        """
        counts = torch.ones(len(self.labels), dtype=torch.float64) if counts is None else counts
        sampled = torch.zeros(self.num_classes, dtype=torch.float64)
        weight = class_weights(sizes, sampled.index_add_(0, self.labels, counts))
        return inflow(self.flow(counts * weight[self.labels]), weight, sizes)


def class_weights(sizes: Tensor, sampled: Tensor) -> Tensor:
    """float64 (K,): how many of `sizes` (K,) each of the `sampled` (K,) stands for, or 0."""
    return torch.where(sampled > 0, sizes / sampled.clamp(min=1).double(), 0.0)


@dataclass(frozen=True)
class Inflow:
    """What K classes have taken in.

    Attributes:
        share: float64 (K,), samples for each sample of the other classes, 0 or more.
        unit: float64 (K,), how much of that is one sample that was looked at.
    """

    share: Tensor
    unit: Tensor

    @property
    def seen(self) -> Tensor:
        """bool (K,): classes of which samples were looked at."""
        return self.unit > 0

    def with_class(self, k: int, other: Inflow) -> Inflow:
        """A copy in which class k has what it has in `other`."""
        at, pick = torch.arange(len(self.share)) == k, torch.where
        return Inflow(pick(at, other.share, self.share), pick(at, other.unit, self.unit))

    def surprise(self, expected: Tensor) -> Tensor:
        """float64 (K,): the probability (Poisson) that as many samples or more would be seen.

        `expected` is the share to compare with, () or (K,).
        """
        seen, mean = self.share / self.unit, expected / self.unit
        return torch.where(seen > 0, torch.special.gammainc(seen.clamp(min=1e-12), mean), 1.0)


def inflow(flow: Tensor, weight: Tensor, sizes: Tensor, rows: Tensor | None = None) -> Inflow:
    """The share of the other classes' samples that each class is estimated to have taken in.

    Nothing where fewer than FEW other classes have samples, as drift cannot be told then.

    Args:
        flow: float64 (R, K), samples of the whole set that left a class for each other class; what
            stayed does not count.
        weight: float64 (R,), samples of the whole set that each sample of a class stands for.
        sizes: int64 (K,), samples of each class.
        rows: int64 (R,), the classes that are asked about; None = all K.
    """
    classes = torch.arange(len(sizes))
    rows = classes if rows is None else rows
    others = (sizes > 0) & (classes != rows[:, None])
    count = others.sum(1, keepdim=True)
    order = torch.where(others, flow / sizes.clamp(min=1), torch.inf).argsort(dim=1, stable=True)
    calm = (classes < ((1 - DRIFT) * count).round()) & (count >= FEW)
    kept = others.gather(1, order) & calm
    base = (sizes.expand_as(order).gather(1, order) * kept).sum(1).clamp(min=1)
    return Inflow((flow.gather(1, order) * kept).sum(1) / base, weight / base)


def inflow_scores(taken: Inflow, limit: float | None) -> Scores:
    """Distance of each class's inflow from the median class, in robust standard deviations.

    A class is flagged if its score exceeds `limit` (None: never); if so many samples would not be
    seen by chance, at a level of CHANCE for all classes together (Bonferroni), in a class that lies
    one deviation above the median; and if the flagged classes stand apart from the others: where
    purification harms much, some classes drift far more than most.
    """
    present, limit = taken.seen, torch.inf if limit is None else limit
    floor = max(FLOOR, ALIKE * taken.share[present].mean().item())
    scores = robust_scores(taken.share, present, limit, floor)
    rare = taken.surprise(scores.one_above) < CHANCE / present.sum()
    return replace(scores, outlies=_apart(taken.share, scores.outlies & rare))


def _apart(share: Tensor, candidates: Tensor) -> Tensor:
    """bool (K,): of the candidates, as many as stand APART from all classes below them."""
    order = share.argsort(descending=True, stable=True)
    below = torch.cat([share[order][1:], share.new_zeros(1)])
    gaps = (share[order] > APART * below) & (candidates[order].cumprod(0) == 1)
    last = gaps.nonzero().flatten()[-1:]
    chosen = torch.zeros_like(candidates)
    chosen[order[: int(last) + 1 if len(last) else 0]] = True
    return chosen
